//! The shared store: one suite, asked of all three.

mod etcd;
mod laws;

use std::time::Duration;

use etcd::{Cluster, needs_etcd};
use laws::{
    commit, leases_end_by_themselves, put, records_change_by_compare_and_put_only, suite, value,
};
use orchestrator::store::Store;
use orchestrator::store::shared::etcd::{Endpoint, Etcd, EtcdConfig, PREFIX};
use orchestrator::store::shared::{Change, Committed, Expect, Keep, Memory, Shared, Sqlite};

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
