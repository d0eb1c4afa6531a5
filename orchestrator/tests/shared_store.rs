//! The shared store: one suite, asked of all three.

mod etcd;

use std::time::Duration;

use etcd::{Cluster, needs_etcd};
use orchestrator::store::Store;
use orchestrator::store::shared::etcd::{Endpoint, Etcd, EtcdConfig, PREFIX};
use orchestrator::store::shared::{Change, Committed, Expect, Guard, Keep, Memory, Shared, Sqlite};

fn put(key: &str, expect: Expect, value: &str) -> Change {
    Change::put(key, expect, value.as_bytes().to_vec())
}

async fn commit(shared: &Shared, changes: Vec<Change>) -> Committed {
    // A member that is too busy to take a connection in time was not asked anything.
    for _ in 0..5 {
        match shared.commit(changes.clone(), None).await {
            Err(error) if error.to_string().contains("no connection") => {}
            done => return done.expect("commit"),
        }
    }
    panic!("no connection, again and again");
}

async fn value(shared: &Shared, key: &str) -> Option<String> {
    let entry = shared.get(key).await.expect("get")?;
    Some(String::from_utf8(entry.value).expect("UTF-8"))
}

/// All that a shared store must be.
async fn suite(shared: &Shared) {
    records_change_by_compare_and_put_only(shared).await;
    a_commit_is_made_as_a_whole_or_not_at_all(shared).await;
    a_guard_says_whose_word_counts(shared).await;
    prefixes_are_prefixes(shared).await;
    what_hangs_on_a_lease_goes_with_it(shared).await;
    of_many_at_once_each_counts_once(shared).await;
    changes_are_heard(shared).await;
}

async fn records_change_by_compare_and_put_only(shared: &Shared) {
    let Committed::Done(first) = commit(shared, vec![put("a/1", Expect::Absent, "x")]).await else {
        panic!("it was not there");
    };
    let again = commit(shared, vec![put("a/1", Expect::Absent, "y")]).await;
    assert_eq!(again, Committed::Refused);
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (first, first));
    let Committed::Done(second) =
        commit(shared, vec![put("a/1", Expect::Version(first), "y")]).await
    else {
        panic!("it was not changed since");
    };
    assert!(second > first);
    let stale = commit(shared, vec![put("a/1", Expect::Version(first), "z")]).await;
    assert_eq!(stale, Committed::Refused);
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (second, first));
    assert_eq!(value(shared, "a/1").await.as_deref(), Some("y"));
    let gone = commit(shared, vec![Change::remove("a/1", Expect::Version(second))]).await;
    assert!(matches!(gone, Committed::Done(_)));
    assert_eq!(value(shared, "a/1").await, None);
    let Committed::Done(third) = commit(shared, vec![put("a/1", Expect::Absent, "x")]).await else {
        panic!("it is gone");
    };
    let entry = shared.get("a/1").await.expect("get").expect("it is there");
    assert_eq!((entry.version, entry.created), (third, third), "made anew");
}

async fn a_commit_is_made_as_a_whole_or_not_at_all(shared: &Shared) {
    let mixed = vec![
        put("b/1", Expect::Absent, "1"),
        put("b/2", Expect::Version(1), "2"),
    ];
    assert_eq!(commit(shared, mixed).await, Committed::Refused);
    assert_eq!(value(shared, "b/1").await, None);
    let both = vec![
        put("b/1", Expect::Absent, "1"),
        put("b/2", Expect::Anything, "2"),
    ];
    assert!(matches!(commit(shared, both).await, Committed::Done(_)));
    let snapshot = shared.list("b/").await.expect("list");
    let versions: Vec<u64> = snapshot.entries.iter().map(|entry| entry.version).collect();
    assert_eq!(versions.len(), 2);
    assert_eq!(versions[0], versions[1], "one commit, one revision");
}

async fn a_guard_says_whose_word_counts(shared: &Shared) {
    let Committed::Done(created) = commit(shared, vec![put("seat", Expect::Absent, "me")]).await
    else {
        panic!("nobody sat there");
    };
    let guard = Guard {
        key: "seat".into(),
        created,
    };
    let by = async |guard: &Guard, text: &str| {
        let change = put("c/1", Expect::Anything, text);
        shared
            .commit(vec![change], Some(guard))
            .await
            .expect("commit")
    };
    assert!(matches!(by(&guard, "1").await, Committed::Done(_)));
    // Another value in the same seat is the same seat; a seat that was left and taken again is another.
    commit(shared, vec![put("seat", Expect::Anything, "still me")]).await;
    assert!(matches!(by(&guard, "2").await, Committed::Done(_)));
    commit(shared, vec![Change::remove("seat", Expect::Anything)]).await;
    assert_eq!(by(&guard, "3").await, Committed::Refused);
    commit(shared, vec![put("seat", Expect::Absent, "you")]).await;
    assert_eq!(by(&guard, "4").await, Committed::Refused);
    assert_eq!(value(shared, "c/1").await.as_deref(), Some("2"));
    commit(shared, vec![Change::remove("seat", Expect::Anything)]).await;
}

async fn prefixes_are_prefixes(shared: &Shared) {
    for key in ["d/1", "d/10", "d/2", "d0", "da"] {
        commit(shared, vec![put(key, Expect::Anything, key)]).await;
    }
    let keys = async |prefix: &str| {
        let entries = shared.list(prefix).await.expect("list").entries;
        entries
            .into_iter()
            .map(|entry| entry.key)
            .collect::<Vec<_>>()
    };
    assert_eq!(keys("d/").await, ["d/1", "d/10", "d/2"]);
    assert_eq!(keys("d/1").await, ["d/1", "d/10"]);
    assert_eq!(keys("d/3").await, Vec::<String>::new());
    assert_eq!(value(shared, "d/1").await.as_deref(), Some("d/1"));
}

async fn what_hangs_on_a_lease_goes_with_it(shared: &Shared) {
    let lease = shared.lease(Duration::from_secs(30)).await.expect("lease");
    let hang = |key: &str, lease| {
        let bytes = b"here".to_vec();
        Change::keep(key, Expect::Anything, bytes, Keep::With(lease))
    };
    commit(
        shared,
        vec![hang("e/1", lease), put("e/2", Expect::Anything, "stays")],
    )
    .await;
    assert!(shared.keep(lease).await.expect("keep"));
    assert_eq!(value(shared, "e/1").await.as_deref(), Some("here"));
    shared.revoke(lease).await.expect("revoke");
    assert_eq!(value(shared, "e/1").await, None);
    assert_eq!(value(shared, "e/2").await.as_deref(), Some("stays"));
    let late = commit(shared, vec![hang("e/3", lease)]).await;
    assert_eq!(late, Committed::Refused, "on a lease that has ended");
    shared.revoke(lease).await.expect("once more");
}

async fn of_many_at_once_each_counts_once(shared: &Shared) {
    let adders = (0..8).map(|_| {
        let shared = shared.clone();
        tokio::spawn(async move {
            for _ in 0..5 {
                loop {
                    let entry = shared.get("f").await.expect("get");
                    let (expect, seen) = match &entry {
                        None => (Expect::Absent, 0),
                        Some(entry) => {
                            let text = String::from_utf8_lossy(&entry.value);
                            (
                                Expect::Version(entry.version),
                                text.parse().expect("number"),
                            )
                        }
                    };
                    let next: u32 = seen + 1;
                    let change = put("f", expect, &next.to_string());
                    if let Committed::Done(_) = commit(&shared, vec![change]).await {
                        break;
                    }
                }
            }
        })
    });
    for adder in adders.collect::<Vec<_>>() {
        adder.await.expect("adder");
    }
    assert_eq!(value(shared, "f").await.as_deref(), Some("40"));
}

async fn changes_are_heard(shared: &Shared) {
    let mut changes = shared.changes();
    // A stream that was opened just now may not be there yet: it is told of again and again.
    let told = async {
        loop {
            commit(shared, vec![put("g", Expect::Anything, "!")]).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = told => {}
        heard = tokio::time::timeout(Duration::from_secs(20), changes.changed()) => {
            heard.expect("in time").expect("a change");
        }
    }
}

fn etcd(cluster: &Cluster) -> EtcdConfig {
    EtcdConfig {
        endpoints: Endpoint::list(&cluster.url()).expect("members"),
        prefix: PREFIX.into(),
        ca: None,
        identity: None,
        user: None,
    }
}

fn open(config: EtcdConfig) -> Shared {
    Shared::Etcd(Etcd::open(config).expect("open"))
}

#[tokio::test]
async fn memory() {
    let shared = Shared::Memory(Memory::default());
    suite(&shared).await;
    leases_end_by_themselves(&shared, Duration::from_millis(50)).await;
}

#[tokio::test]
async fn sqlite_keeps_what_is_to_be_kept_and_rises_from_daemon_to_daemon() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("store.sqlite");
    let own = Store::open(&path).expect("open");
    let shared = Shared::Sqlite(Sqlite::open(&own).await.expect("open"));
    suite(&shared).await;
    let lease = shared.lease(Duration::from_secs(9)).await.expect("lease");
    let keep = |key: &str, keep| Change::keep(key, Expect::Anything, b"1".to_vec(), keep);
    let changes = vec![
        keep("h/always", Keep::Always),
        keep("h/retold", Keep::Retold),
        keep("h/leased", Keep::With(lease)),
    ];
    let Committed::Done(last) = commit(&shared, changes).await else {
        panic!("nothing stands in the way");
    };
    own.close().await;

    let own = Store::open(&path).expect("open");
    let shared = Shared::Sqlite(Sqlite::open(&own).await.expect("open"));
    let entries = shared.list("h/").await.expect("list").entries;
    let keys: Vec<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["h/always"]);
    assert_eq!(entries[0].version, last);
    let next = commit(&shared, vec![keep("h/retold", Keep::Retold)]).await;
    assert!(
        matches!(next, Committed::Done(next) if next > last),
        "{next:?}"
    );
    own.close().await;
}

async fn leases_end_by_themselves(shared: &Shared, lasts: Duration) {
    let lease = shared.lease(lasts).await.expect("lease");
    let change = Change::keep("i", Expect::Anything, b"1".to_vec(), Keep::With(lease));
    commit(shared, vec![change]).await;
    let gone = async {
        while shared.get("i").await.expect("get").is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let gone = tokio::time::timeout(Duration::from_secs(30), gone).await;
    gone.expect("it ends");
    assert!(!shared.keep(lease).await.expect("keep"), "it has ended");
}

#[tokio::test]
async fn etcd_of_one_member() {
    let server = needs_etcd!();
    let mut cluster = Cluster::start(&server, 1);
    let shared = open(etcd(&cluster));
    suite(&shared).await;
    leases_end_by_themselves(&shared, Duration::from_secs(1)).await;
    // Two fleets in one etcd see nothing of each other.
    let mut other = etcd(&cluster);
    other.prefix = "/other/".into();
    let other = open(other);
    assert_eq!(other.list("").await.expect("list").entries, []);

    cluster.kill(0);
    let away = shared
        .list("")
        .await
        .expect_err("nobody answers")
        .to_string();
    assert!(away.contains("no etcd member answers"), "{away}");
    cluster.restart(0);
    let back = async { while shared.list("").await.is_err() {} };
    let back = tokio::time::timeout(Duration::from_secs(30), back).await;
    back.expect("it is found again");
    assert_eq!(value(&shared, "e/2").await.as_deref(), Some("stays"));
}

#[tokio::test]
#[ignore = "three members, killed in turn: `make etcd`"]
async fn etcd_of_three_members_of_which_any_one_may_die() {
    let server = needs_etcd!();
    let mut cluster = Cluster::start(&server, 3);
    let shared = open(etcd(&cluster));
    suite(&shared).await;
    for round in 0..6 {
        let victim = round % 3;
        cluster.kill(victim);
        let key = format!("j/{round}");
        // What broke off may have been done: looked at, and done again if it was not.
        let done = async {
            while !matches!(shared.get(&key).await, Ok(Some(_))) {
                let change = put(&key, Expect::Absent, "1");
                let _ = shared.commit(vec![change], None).await;
            }
        };
        let done = tokio::time::timeout(Duration::from_secs(30), done).await;
        done.unwrap_or_else(|_| panic!("round {round}: two of three are enough"));
        cluster.restart(victim);
    }
    let entries = shared.list("j/").await.expect("list").entries;
    assert_eq!(entries.len(), 6);
}

#[tokio::test]
async fn etcd_by_tls_with_names_checked() {
    let server = needs_etcd!();
    let Some(papers) = Papers::make() else {
        return etcd::skip("no `openssl` to make certificates with");
    };
    let file = |name: &str| papers.dir.path().join(name);
    let text = |name: &str| file(name).display().to_string();
    let more = [
        "--cert-file",
        &text("server.pem"),
        "--key-file",
        &text("server.key"),
        "--client-cert-auth",
        "--trusted-ca-file",
        &text("ca.pem"),
    ];
    let more = more.map(str::to_owned);
    let cluster = Cluster::start_with(&server, 1, true, &more);
    let good = EtcdConfig {
        ca: Some(file("ca.pem")),
        identity: Some((file("client.pem"), file("client.key"))),
        ..etcd(&cluster)
    };
    let shared = open(good.clone());
    suite(&shared).await;

    let refused = async |config: EtcdConfig, why: &str| {
        let error = match Etcd::open(config) {
            Err(error) => error.to_string(),
            Ok(etcd) => {
                let listed = Shared::Etcd(etcd).list("").await;
                listed.expect_err(why).to_string()
            }
        };
        assert!(error.contains(why), "{error}");
    };
    let mut no_ca = good.clone();
    no_ca.ca = None;
    refused(no_ca, "--store-ca").await;
    let mut other_ca = good.clone();
    other_ca.ca = Some(file("other.pem"));
    refused(other_ca, "UnknownIssuer").await;
    let mut other_name = good.clone();
    other_name.endpoints[0].host = "localhost".into();
    refused(other_name, "not valid for name").await;
    let mut nobody = good.clone();
    nobody.identity = None;
    refused(nobody, "ertificate").await;
    let mut unreadable = good.clone();
    unreadable.identity = Some((file("client.pem"), file("none.key")));
    refused(unreadable, "none.key").await;
}

/// Certificates of a CA made for this test, and of another.
struct Papers {
    dir: tempfile::TempDir,
}

impl Papers {
    fn make() -> Option<Self> {
        let dir = tempfile::tempdir().expect("temp dir");
        let script = r#"
            set -e
            ca() {
              openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                -subj "/CN=$1" -keyout "$1.key" -out "$1.pem"
            }
            ca ca; ca other
            for who in server client; do
              openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$who" \
                -keyout $who.key -out $who.csr
              printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' > $who.ext
              openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                -extfile $who.ext -out $who.pem
            done
        "#;
        let made = std::process::Command::new("sh")
            .args(["-c", script])
            .current_dir(dir.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        let made = made.is_ok_and(|status| status.success());
        made.then_some(Self { dir })
    }
}

/// A request past our client, as an administrator of etcd makes it.
fn administer(cluster: &Cluster, path: &str, body: &str) {
    use std::io::{Read, Write};
    let url = cluster.url();
    let at = url.trim_start_matches("etcd://");
    let mut stream = std::net::TcpStream::connect(at).expect("connect");
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\nContent-Length: {length}"
    );
    write!(stream, "{head}\r\n\r\n{body}").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
}

/// Certificates of the kind that `stillpoint auth` issues, and what is said of those that have expired.
#[tokio::test]
async fn etcd_by_certificates_of_our_own_ca_of_which_expired_ones_are_named() {
    use orchestrator::auth::ca::{CA_LASTS, Ca, Kind, Wanted};
    let server = needs_etcd!();
    let dir = tempfile::tempdir().expect("dir");
    let ca = Ca::at(dir.path().join("ca"));
    ca.init("etcd's CA", CA_LASTS).expect("a CA");
    let now = || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .expect("after 1970")
            .as_secs()
    };
    let issue = |name: &str, lasts: u64| {
        let wanted = Wanted {
            name: name.into(),
            kind: Kind::Daemon,
            role: None,
            dns: Vec::new(),
            addresses: vec!["127.0.0.1".parse().expect("an address")],
            lasts: Duration::from_secs(lasts),
        };
        ca.issue(&wanted, now()).expect("issued")
    };
    let (late, good) = (issue("late", 1), issue("good", 3600));
    let start = |server_paper: &orchestrator::auth::ca::Issued| {
        let text = |path: &std::path::Path| path.display().to_string();
        let more = [
            "--cert-file".into(),
            text(&server_paper.certificate),
            "--key-file".into(),
            text(&server_paper.key),
            "--client-cert-auth".into(),
            "--trusted-ca-file".into(),
            text(&server_paper.ca),
        ];
        Cluster::start_with(&server, 1, true, &more)
    };
    while now() <= late.entry.until_unix_s {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let member = start(&good);
    let with = |cluster: &Cluster, paper: &orchestrator::auth::ca::Issued| EtcdConfig {
        ca: Some(ca.certificate()),
        identity: Some((paper.certificate.clone(), paper.key.clone())),
        ..etcd(cluster)
    };
    let shared = open(with(&member, &good));
    records_change_by_compare_and_put_only(&shared).await;
    let problem = open(with(&member, &late))
        .list("")
        .await
        .expect_err("ours is over");
    let problem = problem.to_string();
    assert!(
        problem.contains("this daemon's own certificate for etcd"),
        "{problem}"
    );
    assert!(
        problem.contains("issued/late.pem, has expired"),
        "{problem}"
    );
    let member = start(&late);
    let problem = open(with(&member, &good))
        .list("")
        .await
        .expect_err("theirs is over");
    let problem = problem.to_string();
    assert!(
        problem.contains("its certificate has expired; renew it at that member"),
        "{problem}"
    );
}

#[tokio::test]
async fn etcd_with_a_user_that_may_touch_the_fleets_keys_alone() {
    use base64::Engine;
    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    // All from `/stillpoint/v1/` up to the key after the last that begins so.
    let (first, after) = (base64(PREFIX.as_bytes()), base64(b"/stillpoint/v10"));
    let may = format!(r#""perm":{{"permType":"READWRITE","key":"{first}","range_end":"{after}"}}"#);
    for (path, body) in [
        ("user/add", r#"{"name":"root","password":"r"}"#.to_owned()),
        ("role/add", r#"{"name":"root"}"#.to_owned()),
        ("user/grant", r#"{"user":"root","role":"root"}"#.to_owned()),
        ("role/add", r#"{"name":"fleet"}"#.to_owned()),
        ("role/grant", format!(r#"{{"name":"fleet",{may}}}"#)),
        (
            "user/add",
            r#"{"name":"daemons","password":"secret"}"#.to_owned(),
        ),
        (
            "user/grant",
            r#"{"user":"daemons","role":"fleet"}"#.to_owned(),
        ),
        ("enable", "{}".to_owned()),
    ] {
        administer(&cluster, &format!("/v3/auth/{path}"), &body);
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let with = |password: &str| {
        let file = dir.path().join(password);
        std::fs::write(&file, format!("{password}\n")).expect("password");
        EtcdConfig {
            user: Some(("daemons".into(), file)),
            ..etcd(&cluster)
        }
    };
    suite(&open(with("secret"))).await;

    let refused = async |config: EtcdConfig, why: &str| {
        let listed = open(config).list("").await;
        let error = listed.expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(with("guessed"), "authentication failed").await;
    refused(etcd(&cluster), "user name is empty").await;
    let elsewhere = EtcdConfig {
        prefix: "/other/".into(),
        ..with("secret")
    };
    refused(elsewhere, "permission denied").await;
    let no_file = EtcdConfig {
        user: Some(("daemons".into(), dir.path().join("none"))),
        ..etcd(&cluster)
    };
    refused(no_file, "cannot read the password").await;
}
