use std::os::unix::fs::PermissionsExt;

use minisign::{KeyPair, PublicKey as SigningPublicKey, SecretKey};

use super::*;

const MANIFEST: &[u8] = br#"{"component":"vmm","version":"0.2.0"}"#;

struct Pair {
    public: SigningPublicKey,
    secret: SecretKey,
}

fn pair() -> Pair {
    let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().expect("a key pair");
    Pair {
        public: pk,
        secret: sk,
    }
}

impl Pair {
    fn sign(&self, bytes: &[u8]) -> String {
        let comment = Some("release 0.2.0");
        let signed = minisign::sign(None, &self.secret, bytes, comment, None).expect("sign");
        signed.into_string()
    }

    fn file(&self, dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        let text = self.public.to_box().expect("a box").into_string();
        std::fs::write(&path, text).expect("write");
        path.display().to_string()
    }
}

#[test]
fn each_of_several_keys_counts_and_no_other_does() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (first, second, stranger) = (pair(), pair(), pair());
    let keys = [
        first.file(dir.path(), "a.pub"),
        second.file(dir.path(), "b.pub"),
    ];
    let trust = Trust::load(&keys).expect("keys");
    for pair in [&first, &second] {
        let signer = trust
            .verify(MANIFEST, &pair.sign(MANIFEST), 0)
            .expect("trusted");
        assert_eq!(signer.comment, "release 0.2.0");
        assert_eq!(signer.key_id.len(), 16);
    }
    let error = trust.verify(MANIFEST, &stranger.sign(MANIFEST), 0);
    let Err(TrustError::UnknownKey { id, known }) = error else {
        panic!("{error:?}");
    };
    assert!(known.len() == 2 && !known.contains(&id), "{id} {known:?}");
    let none = Trust::default().verify(MANIFEST, &first.sign(MANIFEST), 0);
    assert_eq!(none, Err(TrustError::NoKeys));
}

#[test]
fn what_was_changed_after_signing_is_seen() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (good, forger) = (pair(), pair());
    let trust = Trust::load(&[good.file(dir.path(), "a.pub")]).expect("a key");
    let signature = good.sign(MANIFEST);
    let mut other = MANIFEST.to_vec();
    other[30] ^= 1;
    let wrong = |manifest: &[u8], signature: &str| {
        let error = trust.verify(manifest, signature, 0);
        assert!(matches!(error, Err(TrustError::Wrong(_))), "{error:?}");
    };
    wrong(&other, &signature);
    // The comment is signed too.
    wrong(
        MANIFEST,
        &signature.replace("release 0.2.0", "release 0.9.0"),
    );
    // Somebody else's signature, that says it is by the good key.
    let forged = forger.sign(MANIFEST);
    let (mut lines, mut theirs): (Vec<_>, Vec<_>) =
        (signature.lines().collect(), forged.lines().collect());
    let pretend = pretending(lines[1], theirs[1]);
    theirs[1] = &pretend;
    wrong(MANIFEST, &theirs.join("\n"));
    // What is no signature.
    lines.truncate(2);
    for text in ["", "hello", "a\nb\nc\nd", &lines.join("\n")] {
        let error = trust.verify(MANIFEST, text, 0);
        assert!(matches!(error, Err(TrustError::Malformed(_))), "{error:?}");
    }
}

/// The second signature, with the key id of the first.
fn pretending(good: &str, forged: &str) -> String {
    let decode = |text: &str| BASE64_STANDARD.decode(text).expect("base64");
    let (good, mut forged) = (decode(good), decode(forged));
    forged[2..10].copy_from_slice(&good[2..10]);
    BASE64_STANDARD.encode(forged)
}

#[test]
fn a_key_that_ended_signs_nothing_new_and_what_it_signed_stays() {
    let dir = tempfile::tempdir().expect("temp dir");
    let old = pair();
    let file = format!("{},until=2026-06-01", old.file(dir.path(), "a.pub"));
    let trust = Trust::load(&[file]).expect("a key");
    let at = |date: &str| {
        let date: Date = date.parse().expect("a date");
        let zoned = date.to_zoned_datetime(TimeZone::UTC).expect("a time");
        u64::try_from(zoned.timestamp().as_nanosecond()).expect("after 1970")
    };
    let signature = old.sign(MANIFEST);
    trust
        .verify(MANIFEST, &signature, at("2026-05-31"))
        .expect("in its time");
    let late = trust.verify(MANIFEST, &signature, at("2026-06-01"));
    assert!(matches!(late, Err(TrustError::Ended { .. })), "{late:?}");
}

/// `stock/` was made by the C program, version 0.11: `minisign -G -W`, `-S`, and `-S -l`.
#[test]
fn signatures_by_the_stock_tool_count_both_of_its_kinds() {
    let stock = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/agent/trust/stock");
    let read = |name: &str| std::fs::read(stock.join(name)).expect("read");
    let dir = tempfile::tempdir().expect("temp dir");
    // A checkout may be writable by a group; a key that counts must not be.
    let key = dir.path().join("minisign.pub");
    std::fs::write(&key, read("minisign.pub")).expect("write");
    let trust = Trust::load(&[key.display().to_string()]).expect("a key");
    let manifest = read("manifest.json");
    for name in ["manifest.json.minisig", "legacy.minisig"] {
        let signature = String::from_utf8(read(name)).expect("text");
        let signer = trust.verify(&manifest, &signature, 0).expect(name);
        assert_eq!(signer.key_id, "9D9947157F219048");
        assert_eq!(signer.comment, "stillpoint-vmm 0.2.0");
        let changed = trust.verify(&manifest[1..], &signature, 0);
        assert!(matches!(changed, Err(TrustError::Wrong(_))), "{changed:?}");
    }
}

#[test]
fn key_files_that_can_not_be_trusted_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("temp dir");
    let good = pair().file(dir.path(), "a.pub");
    let refused = |text: &str| {
        let error = Trust::load(&[text.to_owned()]).expect_err(text);
        format!("{error:#}")
    };
    assert!(refused("/nowhere/minisign.pub").contains("/nowhere/minisign.pub"));
    assert!(refused(&dir.path().display().to_string()).contains("regular file"));
    assert!(refused(&format!("{good},until=soon")).contains("no date"));
    std::fs::set_permissions(&good, std::fs::Permissions::from_mode(0o666)).expect("chmod");
    assert!(refused(&good).contains("others may write"));
    for text in ["", "hello\n", "a\nb\nc\n"] {
        let path = dir.path().join("bad.pub");
        std::fs::write(&path, text).expect("write");
        assert!(refused(&path.display().to_string()).contains("no public key"));
    }
}
