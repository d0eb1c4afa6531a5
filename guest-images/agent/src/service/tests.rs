//! The service, asked over a socketpair by the library's client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use stillpoint_agent::client::{AskError, Client};
use stillpoint_agent::protocol::{Exit, GapsSpec, MAX_OUTPUT};

use super::*;

fn service(hooks: &Path) -> Arc<Service> {
    Arc::new(Service::new(&Settings {
        door: Door::Vsock(0),
        hooks: hooks.to_owned(),
        init: false,
    }))
}

fn client(service: &Arc<Service>) -> Client<UnixStream> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    service.attend(theirs);
    Client::new(ours)
}

fn alone() -> Client<UnixStream> {
    client(&service(Path::new("/nonexistent")))
}

fn shell(script: &str) -> Program {
    Program {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        ..Program::default()
    }
}

fn code<T: std::fmt::Debug>(answer: Result<T, AskError>) -> Code {
    match answer {
        Err(AskError::Refused(problem)) => problem.code,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn health_is_told() {
    let health = alone().health().unwrap();
    assert!(health.cpus > 0 && !health.init);
}

#[test]
fn a_program_runs_with_input_and_outputs() {
    let mut program = shell("cat; echo err >&2; exit 3");
    program.stdin = Some("x".repeat(100_000));
    let ended = alone().exec(program).unwrap();
    assert_eq!(ended.exit, Exit::Code(3));
    assert_eq!(
        (ended.output.stdout.len(), ended.output.stderr.as_str()),
        (100_000, "err\n")
    );
}

#[test]
fn a_signal_and_a_time_limit_are_told_apart() {
    let mut client = alone();
    assert_eq!(
        client.exec(shell("kill -9 $$")).unwrap().exit,
        Exit::Signal(9)
    );
    let mut program = shell("echo begun; exec sleep 1000");
    program.time_limit_ms = Some(100);
    let ended = client.exec(program).unwrap();
    assert_eq!(
        (ended.exit, ended.output.stdout.as_str()),
        (Exit::TimeLimit, "begun\n")
    );
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let mut program = shell("");
    program.program = "/no/such/program".into();
    assert_eq!(code(alone().exec(program)), Code::Failed);
    let mut program = shell("");
    program.args.push("\0".into());
    assert_eq!(code(alone().exec(program)), Code::Failed);
}

#[test]
fn output_beyond_the_bound_is_dropped_and_counted() {
    let ended = alone().exec(shell("head -c 300000 /dev/zero")).unwrap();
    assert_eq!(ended.output.stdout.len(), MAX_OUTPUT);
    assert_eq!(ended.output.dropped, 300_000 - MAX_OUTPUT as u64);
}

#[test]
fn a_started_program_loses_no_output() {
    let mut client = alone();
    let job = client.start(shell("seq 100000")).unwrap().job;
    let mut text = String::new();
    let exit = client.follow(job, |output| {
        text.push_str(&output.stdout);
        assert_eq!(output.dropped, 0);
    });
    assert_eq!(exit.unwrap(), Exit::Code(0));
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(
        text == expected,
        "{} of {} bytes",
        text.len(),
        expected.len()
    );
    assert_eq!(code(client.poll(job, Duration::ZERO)), Code::NoSuchJob);
}

/// The end of a program whose output nobody fetched for long is not the end of its output.
#[test]
fn output_that_waits_in_the_pipe_outlives_the_program() {
    let mut client = alone();
    let script = format!("head -c {MAX_OUTPUT} /dev/zero; printf tail; echo $$ >&2");
    let job = client.start(shell(&script)).unwrap().job;
    // The shell's last word comes after its output is all in the pipe; then it ends.
    let mut bytes = 0;
    let first = client.exec(shell("sleep 0.6")).unwrap();
    assert!(first.exit.is_success());
    let exit = client
        .follow(job, |output| bytes += output.stdout.len())
        .unwrap();
    assert_eq!((exit, bytes), (Exit::Code(0), MAX_OUTPUT + 4));
}

#[test]
fn those_left_behind_are_not_waited_for() {
    let ended = alone().exec(shell("sleep 1000 & echo $!")).unwrap();
    assert_eq!(ended.exit, Exit::Code(0));
    let left: i32 = ended.output.stdout.trim().parse().unwrap();
    kill(Pid::from_raw(left), Signal::SIGKILL).unwrap();
}

#[test]
fn a_started_program_is_killed_with_its_group() {
    let mut client = alone();
    let job = client
        .start(shell("sleep 1000 & echo $!; wait"))
        .unwrap()
        .job;
    assert_eq!(code(client.kill(job, 999)), Code::Failed);
    let mut child = String::new();
    while !child.ends_with('\n') {
        child.push_str(
            &client
                .poll(job, Duration::from_secs(5))
                .unwrap()
                .output
                .stdout,
        );
    }
    client.kill(job, 15).unwrap();
    assert_eq!(client.follow(job, |_| {}).unwrap(), Exit::Signal(15));
    assert_eq!(code(client.kill(job, 15)), Code::NoSuchJob);
    // Its child is gone, or waits for whoever reaps orphans here.
    let stat = format!("/proc/{}/stat", child.trim());
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(
            std::time::Instant::now() < deadline,
            "{stat} is still there"
        );
        std::thread::yield_now();
    }
}

#[test]
fn programs_are_bounded() {
    let mut client = alone();
    let jobs: Vec<u64> = (0..MAX_JOBS)
        .map(|_| client.start(shell("cat")).unwrap().job)
        .collect();
    assert_eq!(code(client.start(shell(""))), Code::TooMany);
    for job in &jobs {
        client.follow(*job, |_| {}).unwrap();
    }
    assert!(client.exec(shell("exit 0")).unwrap().exit.is_success());
}

#[test]
fn connections_are_bounded() {
    let service = service(Path::new("/nonexistent"));
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| client(&service)).collect();
    for client in &mut clients {
        client.health().unwrap();
    }
    let mut line = String::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    service.attend(theirs);
    BufReader::new(ours).read_line(&mut line).unwrap();
    assert!(line.contains("too_many"), "{line}");
}

#[test]
fn nonsense_is_refused_and_the_connection_goes_on() {
    let service = service(Path::new("/nonexistent"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    service.attend(theirs);
    let mut answers = BufReader::new(ours.try_clone().unwrap());
    let mut ask = |line: &[u8]| {
        (&ours).write_all(line).unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer
    };
    assert!(ask(b"\xff\xfe\n").contains("malformed"));
    assert!(ask(b"{\"do\":\"dance\"}\n").contains("unknown"));
    let mut long = vec![b'a'; stillpoint_agent::protocol::MAX_LINE + 1];
    long.push(b'\n');
    assert!(ask(&long).contains("too_long"));
    assert!(ask(b"{\"do\":\"health\"}\n").starts_with("{\"ok\":{"));
}

#[test]
fn gaps_are_probed_while_others_are_answered() {
    let mut client = alone();
    let spec = GapsSpec {
        duration_ms: 600_000,
        duty_percent: 20,
        threshold_us: 0,
    };
    let job = client.gaps_start(spec).unwrap().job;
    client.clocks().unwrap();
    let gaps = client.gaps_collect(job, false).unwrap();
    assert!(gaps.cpus.iter().all(|cpu| cpu.looks > 0), "{gaps:?}");
    assert_eq!(code(client.gaps_collect(job, false)), Code::NoSuchJob);
}

#[test]
fn hooks_run_in_order_under_one_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let before = directory.path().join("before");
    std::fs::create_dir(&before).unwrap();
    let hook = |name: &str, script: &str, mode| {
        // By another process: a child that some other test starts at this moment would hold the
        // file open for writing, and a file that is can't be run.
        let path = before.join(name);
        let text = format!("#!/bin/sh\\n{script}\\n");
        let script = format!("printf '{text}' > {0}; chmod {mode} {0}", path.display());
        assert!(alone().exec(shell(&script)).unwrap().exit.is_success());
    };
    hook("10-first", "echo one", 755);
    hook("20-fails", "exit 4", 755);
    hook("30-not-a-hook", "exit 5", 644);
    let mut client = client(&service(directory.path()));
    let hooks = client.pause_begin(Duration::from_secs(30)).unwrap();
    let told: Vec<_> = hooks
        .ran
        .iter()
        .map(|hook| (hook.name.as_str(), hook.exit))
        .collect();
    let expected = [
        ("10-first", Some(Exit::Code(0))),
        ("20-fails", Some(Exit::Code(4))),
    ];
    assert_eq!(told, expected);
    assert_eq!(hooks.ran[0].output.stdout, "one\n");
    assert!(!hooks.all_well());

    hook("05-slow", "exec sleep 1000", 755);
    let hooks = client.pause_begin(Duration::from_millis(100)).unwrap();
    assert_eq!(
        (hooks.ran[0].exit, hooks.left_out),
        (Some(Exit::TimeLimit), 2)
    );
    // There are none that go after.
    assert!(client.pause_end(Duration::from_secs(1)).unwrap().all_well());
}
