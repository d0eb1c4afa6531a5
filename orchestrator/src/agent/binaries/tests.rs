use super::*;
use crate::model::VMM;

fn addition(path: &Path) -> Addition {
    Addition {
        path: path.to_owned(),
        version: None,
        args: vec!["--x".into()],
        papers: None,
        at_unix_ns: 1,
    }
}

#[test]
fn what_is_no_release_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let binaries = Binaries::new(dir.path(), Trust::default());
    let refused = |path: &Path| {
        let problem = binaries.import(&addition(path)).expect_err("no release");
        assert_eq!(problem.code, Code::NotARelease, "{problem}");
        let left = std::fs::read_dir(dir.path().join("releases"));
        assert_eq!(left.map_or(0, Iterator::count), 0, "something is left");
        problem.message
    };
    assert!(refused(&dir.path().join("nothing")).contains("can't be opened"));
    assert!(refused(dir.path()).contains("not a regular file"));
    let text = dir.path().join("text");
    std::fs::write(&text, "#!/bin/sh\n").expect("write");
    assert!(refused(&text).contains("not executable"));
    std::fs::set_permissions(&text, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    assert!(refused(&text).contains("not an ELF"));
    // An ELF that knows no `describe`.
    let message = refused(Path::new("/bin/true"));
    assert!(message.contains("no manifest"), "{message}");
    let message = refused(Path::new("/bin/false"));
    assert!(message.contains("failed"), "{message}");
}

#[test]
fn a_changed_binary_is_not_handed_out() {
    let dir = tempfile::tempdir().expect("temp dir");
    let binaries = Binaries::new(dir.path(), Trust::default());
    let path = binaries.path("1");
    private_dir(path.parent().expect("parent")).expect("dir");
    std::fs::write(&path, "one").expect("write");
    let mut release = Release {
        signed_by: None,
        manifest: Manifest {
            component: VMM.into(),
            version: "1".into(),
            sha256: digest(&mut File::open(&path).expect("open")).expect("digest"),
            reads: vec![1],
            writes: vec![1],
            args: vec![],
        },
        added_at_unix_ns: 0,
    };
    binaries.verified(&release).expect("as it was added");
    std::fs::write(&path, "two").expect("write");
    let problem = binaries.verified(&release).expect_err("changed");
    assert_eq!(problem.code, Code::DigestMismatch);
    let found = digest(&mut File::open(&path).expect("open")).expect("digest");
    let wanted = std::mem::take(&mut release.manifest.sha256);
    assert!(problem.message.contains(&found) && problem.message.contains(&wanted));
}
