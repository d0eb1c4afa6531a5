//! Which role each route needs: one table, of the API and of the pages. What is not in it needs `admin`.
//!
//! Starting a guest is for admins: it may be given any file of the host as a disk. So is whatever changes the host
//! itself, adds to what can be run on it, or tells who did what.

use axum::http::Method;

use crate::auth::Role;
use Role::{Admin, Operate, Read};

/// Method, route, role.
pub const ROLES: &[(&str, &str, Role)] = &[
    // Looking.
    ("GET", "/openapi.json", Read),
    ("GET", "/metrics", Read),
    ("GET", "/v1/doctor", Read),
    ("GET", "/v1/events", Read),
    ("GET", "/v1/explain", Read),
    ("GET", "/v1/host/carve-out", Read),
    ("GET", "/v1/host/swaps", Read),
    ("GET", "/v1/host/swaps/{id}", Read),
    ("GET", "/v1/hosts", Read),
    ("GET", "/v1/journal", Read),
    ("GET", "/v1/pauses", Read),
    ("GET", "/v1/pins", Read),
    ("GET", "/v1/releases", Read),
    ("GET", "/v1/releases/{version}/verification", Read),
    ("GET", "/v1/rollouts", Read),
    ("GET", "/v1/rollouts/{id}", Read),
    ("GET", "/v1/rollouts/{id}/history", Read),
    ("GET", "/v1/swaps", Read),
    ("GET", "/v1/swaps/{id}", Read),
    ("GET", "/v1/vms", Read),
    ("GET", "/v1/vms/{name}", Read),
    ("GET", "/v1/vms/{name}/swaps", Read),
    ("GET", "/v1/whoami", Read),
    // Moving guests between what is there already.
    ("POST", "/v1/pauses/{event}/approve", Operate),
    ("POST", "/v1/pauses/{event}/cancel", Operate),
    ("POST", "/v1/rollouts", Operate),
    ("POST", "/v1/rollouts/{id}/acts", Operate),
    ("POST", "/v1/swaps", Operate),
    ("POST", "/v1/vms/{name}/checks", Operate),
    ("POST", "/v1/vms/{name}/stop", Operate),
    ("POST", "/v1/vms/{name}/swaps", Operate),
    ("PUT", "/v1/hosts/{name}/cordon", Operate),
    ("DELETE", "/v1/hosts/{name}/cordon", Operate),
    // What can be run here, and the host itself.
    ("GET", "/v1/audit", Admin),
    ("PUT", "/v1/vms/{name}", Admin),
    ("DELETE", "/v1/vms/{name}", Admin),
    ("POST", "/v1/releases", Admin),
    ("DELETE", "/v1/releases/{version}", Admin),
    ("PUT", "/v1/pins/{component}", Admin),
    ("DELETE", "/v1/pins/{component}", Admin),
    ("DELETE", "/v1/hosts/{name}", Admin),
    ("DELETE", "/v1/host/carve-out", Admin),
    ("DELETE", "/v1/host/carve-out/{vm}", Admin),
    ("POST", "/v1/host/carve-out/{vm}/retry", Admin),
    ("POST", "/v1/host/kernel-swaps", Admin),
    ("POST", "/v1/host/kernel-swaps/check", Admin),
    ("POST", "/v1/host/kvm/checks", Admin),
    ("POST", "/v1/host/swaps", Admin),
    ("POST", "/v1/host/swaps/{id}/release", Admin),
    // Pages.
    ("GET", "/", Read),
    ("GET", "/guests/{name}", Read),
    ("GET", "/fleet", Read),
    ("GET", "/rollouts/{id}", Read),
    ("GET", "/events", Read),
    ("GET", "/host", Read),
    ("GET", "/live", Read),
    ("GET", "/style.css", Read),
    ("GET", "/live.js", Read),
    ("POST", "/events/{event}/approve", Operate),
    ("POST", "/events/{event}/cancel", Operate),
    ("POST", "/rollouts/{id}/pause", Operate),
    ("POST", "/rollouts/{id}/resume", Operate),
];

/// The role that a request needs. What leads nowhere needs that somebody is known at all: they are told so.
pub fn needed(method: &Method, route: Option<&str>) -> Role {
    let Some(route) = route else {
        return Read;
    };
    let method = match method.as_str() {
        "HEAD" => "GET",
        method => method,
    };
    let mut all = ROLES.iter();
    let found = all.find(|(of, at, _)| (*of, *at) == (method, route));
    found.map_or(Admin, |(_, _, role)| *role)
}

/// Whether a request asks for a change.
pub fn is_change(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation of the document is in the table once, and has its role in the document.
    #[test]
    fn every_route_has_its_role() {
        let text = crate::api::openapi_json().expect("document");
        let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let mut described = std::collections::BTreeSet::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                let method = method.to_uppercase();
                let mut of = ROLES
                    .iter()
                    .filter(|(m, p, _)| (*m, *p) == (&*method, &**path));
                let (_, _, role) = of
                    .next()
                    .unwrap_or_else(|| panic!("{method} {path} has no role"));
                assert!(of.next().is_none(), "{method} {path} has two");
                assert_eq!(operation["x-role"], role.word(), "{method} {path}");
                described.insert((method, path.clone()));
            }
        }
        for (method, path, _) in ROLES.iter().filter(|(_, path, _)| path.starts_with("/v1/")) {
            let is_there = described.contains(&((*method).to_owned(), (*path).to_owned()));
            assert!(is_there, "{method} {path} is no route");
        }
    }

    #[test]
    fn no_change_is_for_readers_and_what_is_not_in_the_table_is_for_admins() {
        for (method, path, role) in ROLES {
            let method: Method = method.parse().expect("a method");
            assert!(!is_change(&method) || *role >= Operate, "{method} {path}");
            assert_eq!(needed(&method, Some(path)), *role);
        }
        assert_eq!(needed(&Method::PATCH, Some("/v1/vms")), Admin);
        assert_eq!(needed(&Method::HEAD, Some("/v1/vms")), Read);
        assert_eq!(needed(&Method::POST, Some("/v1/new")), Admin);
        assert_eq!(needed(&Method::POST, None), Read);
    }
}
