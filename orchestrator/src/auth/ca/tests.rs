use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> u64 {
    crate::execute::unix_ns() / 1_000_000_000
}

fn client(name: &str, role: Role) -> Wanted {
    Wanted {
        name: name.into(),
        kind: Kind::Client,
        role: Some(role),
        dns: Vec::new(),
        addresses: Vec::new(),
        lasts: DAY,
    }
}

fn ca() -> (tempfile::TempDir, Ca) {
    let dir = tempfile::tempdir().expect("dir");
    let ca = Ca::at(dir.path().join("ca"));
    ca.init("a CA", CA_LASTS).expect("a CA");
    (dir, ca)
}

#[test]
fn what_is_issued_says_who_in_which_role_and_how_long() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, ca) = ca();
    let issued = ca
        .issue(&client("alice", Role::Operate), now())
        .expect("issued");
    let read = Certificate::of_file(&issued.certificate).expect("read");
    assert_eq!(
        (read.name.as_str(), read.role),
        ("alice", Some(Role::Operate))
    );
    assert_eq!((read.issuer.as_str(), read.is_ca), ("a CA", false));
    assert_eq!(read.serial, issued.entry.serial);
    assert!(read.until_unix_s.abs_diff(now() + DAY.as_secs()) < 60);
    let mode = std::fs::metadata(&issued.key)
        .expect("key")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let daemon = Wanted {
        kind: Kind::Daemon,
        role: None,
        dns: vec!["h1.example".into()],
        addresses: vec!["10.0.0.1".parse().expect("an address")],
        ..client("h1", Role::Read)
    };
    let issued = ca.issue(&daemon, now()).expect("issued");
    let read = Certificate::of_file(&issued.certificate).expect("read");
    assert_eq!(read.names, ["h1.example", "10.0.0.1"]);
    assert_eq!(read.role, None);
    // Issued anew it is the same but for key and number.
    let again = ca.renew("h1", DAY, now()).expect("renewed");
    assert_eq!(again.entry.names, issued.entry.names);
    assert_ne!(again.entry.serial, issued.entry.serial);
}

#[test]
fn what_cannot_be_issued_is_refused_and_nothing_is_registered() {
    let (_dir, ca) = ca();
    let refused = |wanted: &Wanted, why: &str| {
        let problem = ca.issue(wanted, now()).expect_err(why).to_string();
        assert!(problem.contains(why), "{problem}");
    };
    for name in ["", "../x", ".x", "a/b", "a b", "x-key", &"n".repeat(65)] {
        refused(&client(name, Role::Read), "can't be a name");
    }
    let nameless = Wanted {
        kind: Kind::Daemon,
        ..client("h1", Role::Read)
    };
    refused(&nameless, "--dns or --address");
    let eternal = Wanted {
        lasts: CA_LASTS * 2,
        ..client("alice", Role::Read)
    };
    refused(&eternal, "longer than the CA");
    assert_eq!(ca.issued().expect("a register"), []);
    ca.issue(&client("alice", Role::Read), now())
        .expect("issued");
    refused(
        &client("alice", Role::Admin),
        "has a certificate that is good",
    );
    let unknown = ca
        .renew("bob", DAY, now())
        .expect_err("unknown")
        .to_string();
    assert!(unknown.contains("auth ls"), "{unknown}");
    let twice = ca
        .init("again", CA_LASTS)
        .expect_err("there is one")
        .to_string();
    assert!(twice.contains("already"), "{twice}");
    let none = Ca::at("/nonexistent/ca".into())
        .issued()
        .expect_err("none")
        .to_string();
    assert!(none.contains("auth init"), "{none}");
}

#[test]
fn what_is_revoked_is_on_the_list_and_its_name_can_have_another() {
    let (_dir, ca) = ca();
    let on_list = || {
        let lists = crate::auth::certificate::revoked(&ca.revoked()).expect("a list");
        crate::auth::certificate::serials(&lists[0]).expect("serials")
    };
    assert!(on_list().is_empty());
    let first = ca
        .issue(&client("alice", Role::Read), now())
        .expect("issued");
    let second = ca.renew("alice", DAY, now()).expect("renewed");
    let revoked = ca.revoke("alice", now()).expect("revoked");
    assert_eq!(revoked.len(), 2);
    assert_eq!(on_list(), [first.entry.serial, second.entry.serial]);
    assert!(ca.revoke("alice", now()).expect("none is good").is_empty());
    let third = ca
        .issue(&client("alice", Role::Admin), now())
        .expect("issued");
    assert!(!on_list().contains(&third.entry.serial));
    let states: Vec<_> = ca
        .issued()
        .expect("a register")
        .iter()
        .map(|e| e.is(now()))
        .collect();
    assert_eq!(states, [Is::Revoked, Is::Revoked, Is::Good]);
    assert_eq!(third.entry.is(third.entry.until_unix_s + 1), Is::Expired);
}

#[test]
fn a_role_that_is_none_and_two_roles_give_none() {
    let key = KeyPair::generate().expect("key");
    let role_of = |uris: &[&str]| {
        let mut params = CertificateParams::default();
        let uri = |uri: &&str| SanType::URI(Ia5String::try_from(*uri).expect("text"));
        params.subject_alt_names = uris.iter().map(uri).collect();
        let made = params.self_signed(&key).expect("made");
        Certificate::of_der(made.der()).expect("read").role
    };
    assert_eq!(role_of(&["urn:stillpoint:role:admin"]), Some(Role::Admin));
    assert_eq!(role_of(&["urn:stillpoint:role:root"]), None);
    assert_eq!(
        role_of(&["urn:stillpoint:role:read", "urn:stillpoint:role:admin"]),
        None
    );
    assert_eq!(role_of(&["https://example/role:admin"]), None);
    assert_eq!(role_of(&[]), None);
}
