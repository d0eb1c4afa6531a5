//! Ping-pong: a frame goes out, and must come back as it was before the next one goes.
//!
//! The server sends back whatever bytes come; the client alone knows what they must be. A
//! connection that breaks, or stands still for longer than the limit, has failed.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;

use crate::endpoint::{Connect, Door, Stream, Target};
use crate::frame::{Frames, Kind, MAX_PAYLOAD};
use crate::pace::{Pace, PaceReport};
use crate::report::{self, Report};
use crate::term;

/// What a server's report is called.
const SERVE: &str = "echo-serve";

/// The client's side.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    connect: Connect,
    /// For how long.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
    /// How many round trips, instead.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Bytes of a frame.
    #[arg(long, value_name = "N", default_value_t = 64)]
    frame_bytes: usize,
    /// Time between round trips.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    interval_ms: u64,
    /// Where the randomness comes from; without it, from anywhere.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A round trip that takes longer has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    stall_limit: u64,
}

/// The server's side.
#[derive(clap::Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    door: Door,
    /// Ends after one connection.
    #[arg(long)]
    once: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct EchoReport {
    load: &'static str,
    ok: bool,
    seed: u64,
    round_trips: u64,
    /// The mean of the round trips.
    mean_us: f64,
    /// The longest of them; when it began stands in `pace` as the longest stall.
    worst_us: f64,
    error: Option<String>,
    pace: PaceReport,
}

impl Report for EchoReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn sentence(&self) -> String {
        let end = self
            .error
            .as_ref()
            .map(|error| format!("; it failed: {error}"));
        let end = end.unwrap_or_default();
        if self.load == SERVE {
            return format!("{SERVE}: {} bytes came and went{end}", self.pace.bytes);
        }
        let Self {
            round_trips,
            mean_us,
            worst_us,
            ..
        } = self;
        format!(
            "echo: {round_trips} round trips, mean {mean_us:.0} us, worst {worst_us:.0} us{end}"
        )
    }
}

/// The client.
pub(crate) fn run(args: &Args) -> anyhow::Result<EchoReport> {
    let bytes = args.frame_bytes;
    ensure!(
        bytes <= MAX_PAYLOAD,
        "a frame has at most {MAX_PAYLOAD} bytes"
    );
    let mut stream = args
        .target
        .connect(&args.connect, Duration::from_secs(args.stall_limit))?;
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut report = EchoReport {
        load: "echo",
        seed,
        ..EchoReport::default()
    };
    let mut frames = Frames::new(seed, bytes, false);
    let mut pace = Pace::begin();
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let more = |trips| match args.count {
        Some(count) => trips < count,
        None => term::goes_on(end),
    };
    let mut total_us = 0.0;
    while report.error.is_none() && more(report.round_trips) {
        let begun = Instant::now();
        match round_trip(&mut stream, frames.make(Kind::Load, report.round_trips)) {
            Ok(()) => {
                report.round_trips += 1;
                let took = begun.elapsed().as_secs_f64() * 1e6;
                total_us += took;
                report.worst_us = report.worst_us.max(took);
                pace.add(bytes);
            }
            Err(error) => report.error = Some(format!("trip {}: {error}", report.round_trips)),
        }
        if args.interval_ms > 0 {
            std::thread::sleep(Duration::from_millis(args.interval_ms));
        }
    }
    report.mean_us = total_us / report.round_trips.max(1) as f64;
    report.ok = report.error.is_none() && report.round_trips > 0;
    report.pace = pace.end();
    Ok(report)
}

fn round_trip(stream: &mut (impl Read + Write), frame: &[u8]) -> io::Result<()> {
    let mut back = vec![0; frame.len()];
    // A large frame fills both directions before all of it is out, unless it is taken back
    // piece by piece.
    for (out, back) in frame.chunks(4096).zip(back.chunks_mut(4096)) {
        stream.write_all(out)?;
        stream.read_exact(back)?;
    }
    if back != frame {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "other bytes came back",
        ));
    }
    Ok(())
}

/// The server.
pub(crate) fn serve(args: &ServeArgs, json: bool) -> anyhow::Result<bool> {
    let listener = args.door.listen()?;
    loop {
        // Whoever connected may be silent for as long as it likes.
        let mut stream = listener.accept(Duration::from_secs(24 * 3600))?;
        if args.once {
            return report::tell(&send_back(&mut stream), json);
        }
        std::thread::spawn(move || send_back(&mut stream));
    }
}

/// Until the other side ends.
fn send_back(stream: &mut Stream) -> EchoReport {
    let mut pace = Pace::begin();
    let mut bytes = [0; 16 << 10];
    let mut error = None;
    loop {
        let moved = match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(length) => stream.write_all(&bytes[..length]).map(|()| length),
            Err(error) => Err(error),
        };
        match moved {
            Ok(length) => pace.add(length),
            Err(problem) => {
                error = Some(problem.to_string());
                break;
            }
        }
    }
    EchoReport {
        load: SERVE,
        ok: error.is_none(),
        error,
        pace: pace.end(),
        ..EchoReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    fn args(path: &Path, line: Option<&str>) -> Args {
        Args {
            target: Target {
                addr: None,
                vsock: None,
                unix: Some(path.to_owned()),
            },
            connect: Connect {
                connect_line: line.map(str::to_owned),
            },
            seconds: 60,
            count: Some(200),
            frame_bytes: 10_000,
            interval_ms: 0,
            seed: Some(5),
            stall_limit: 60,
        }
    }

    /// Serves one connection by `serve`, behind a connect line.
    fn server(path: &Path, serve: impl FnOnce(&mut Stream) + Send + 'static) {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = Stream::Unix(stream);
            let line = crate::endpoint::read_line(&mut stream).unwrap();
            assert_eq!(line, "CONNECT 5000");
            stream.write_all(b"OK 1234\n").unwrap();
            serve(&mut stream);
        });
    }

    #[test]
    fn what_comes_back_is_what_went() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        server(&path, |stream| drop(send_back(stream)));
        let report = run(&args(&path, Some("CONNECT 5000"))).unwrap();
        assert!(report.ok() && report.round_trips == 200, "{report:?}");
        assert!(report.worst_us >= report.mean_us && report.mean_us > 0.0);
    }

    #[test]
    fn other_bytes_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        server(&path, |stream| {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                bytes[0] ^= 1;
                if stream.write_all(&bytes[..length]).is_err() {
                    return;
                }
            }
        });
        let report = run(&args(&path, Some("CONNECT 5000"))).unwrap();
        assert!(!report.ok(), "{report:?}");
    }

    #[test]
    fn a_connection_that_breaks_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        server(&path, |stream| {
            let mut bytes = [0; 4096];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        });
        let report = run(&args(&path, Some("CONNECT 5000"))).unwrap();
        assert!(!report.ok() && report.error.is_some(), "{report:?}");
    }
}
