//! Who is let in: whoever knows the key, which lies in the run directory and can be read by the daemon's
//! user and root alone, as the API's socket can be used by them alone.
//!
//! The key comes once, in the address that `stillpoint page` prints; from then on it is a cookie that no
//! other site's pages can send (`SameSite=Strict`) or read. What changes something is a form that holds
//! the key as well.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use maud::html;

use crate::auth::{Caller, Role};

const COOKIE: &str = "stillpoint";

/// Where the address lies, with the key in it.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("page.url")
}

/// What lets in. It is not shown by `Debug`.
#[derive(Clone)]
pub struct Key(String);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// A new one, of 128 random bits.
    pub fn new() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(
            bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        ))
    }

    /// Writes the address with the key to where `stillpoint page` finds it.
    pub fn write(&self, run_dir: &Path, at: SocketAddr) -> std::io::Result<()> {
        let path = path(run_dir);
        let _ = std::fs::remove_file(&path);
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        writeln!(file, "http://{at}/?key={}", self.0)
    }

    /// The key as a form's field.
    pub(super) fn field(&self) -> maud::Markup {
        html! { input type="hidden" name="key" value=(self.0); }
    }

    /// Compared in a time that does not depend on where they differ.
    pub(super) fn is(&self, said: &str) -> bool {
        let (ours, theirs) = (self.0.as_bytes(), said.as_bytes());
        let differs = ours.iter().zip(theirs).fold(0, |all, (a, b)| all | (a ^ b));
        ours.len() == theirs.len() && differs == 0
    }

    fn is_in(&self, headers: &HeaderMap) -> bool {
        let cookies = headers.get_all(header::COOKIE).iter();
        let cookies = cookies.filter_map(|value| value.to_str().ok());
        let mut pairs = cookies.flat_map(|value| value.split(';'));
        pairs.any(|pair| {
            let said = pair.trim().strip_prefix(COOKIE);
            said.and_then(|rest| rest.strip_prefix('='))
                .is_some_and(|said| self.is(said))
        })
    }
}

/// What the door goes by.
#[derive(Clone, Debug)]
pub(super) struct Porter {
    pub(super) key: Key,
    /// What whoever knows it may do.
    pub(super) role: Role,
}

/// What needs no key: how pages look.
const OPEN: [&str; 2] = ["/style.css", "/live.js"];

/// Lets in who knows the key; takes it from the address into a cookie.
pub(super) async fn check(
    State(Porter { key, role }): State<Porter>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    mut request: Request,
    next: Next,
) -> Response {
    let known = Caller {
        who: "the page's key".into(),
        from: from.to_string(),
        role: Some(role),
        remedy: "the daemon gives its page another with `stillpointd --web-role`".into(),
        shown: None,
    };
    if OPEN.contains(&request.uri().path()) {
        request.extensions_mut().insert(known);
        return next.run(request).await;
    }
    let query = request.uri().query().unwrap_or_default();
    let said = query.split('&').find_map(|pair| pair.strip_prefix("key="));
    if said.is_some_and(|said| key.is(said)) {
        let cookie = format!("{COOKIE}={}; Path=/; HttpOnly; SameSite=Strict", key.0);
        let headers = [
            (header::SET_COOKIE, cookie),
            (header::LOCATION, request.uri().path().to_owned()),
        ];
        return (StatusCode::SEE_OTHER, headers).into_response();
    }
    if key.is_in(request.headers()) {
        request.extensions_mut().insert(known);
        return next.run(request).await;
    }
    let main = html! {
        h1 { "Who are you?" }
        p { "This page is for who may use the daemon of this host. On the host, as the daemon's user or as root, " code { "stillpoint page" } " prints the address that lets you in." }
    };
    (StatusCode::FORBIDDEN, super::page("Stillpoint", "", main)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_cookie_and_nothing_like_it() {
        let key = Key::new().expect("random bits");
        let with = |cookie: String| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, cookie.parse().expect("a header"));
            key.is_in(&headers)
        };
        assert!(with(format!("{COOKIE}={}", key.0)));
        assert!(with(format!("a=b; {COOKIE}={}", key.0)));
        assert!(!with(format!("x{COOKIE}={}", key.0)));
        assert!(!with(format!("{COOKIE}={}0", key.0)));
        assert!(!with(format!("{COOKIE}=")));
        assert_ne!(key.0, Key::new().expect("random bits").0);
        assert!(!format!("{key:?}").contains(&key.0));
    }
}
