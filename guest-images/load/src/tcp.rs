//! One stream, one way, checked frame by frame.
//!
//! ```text
//!   client                            server
//!      │ ── hello (a line of JSON) ────▶ │
//!      │ ══ frames, then the last one ══▶ │     or the other way round, as the hello says
//!      │ ◀───────── what was received ── │     the receiver tells the sender
//! ```
//!
//! Frames come in order or they don't come at all: a number that is missing was lost, one that
//! comes again was doubled. A stream that ends without its last frame has lost the rest.

use std::io::{BufReader, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::endpoint::{Connect, Door, Stream, Target, read_line};
use crate::frame::{Broken, Frames, Kind, MAX_PAYLOAD, Taker};
use crate::pace::{Pace, PaceReport};
use crate::report::{self, Report};
use crate::term;

/// The two sides.
#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// Connects, and sends (or with --reverse receives).
    Send(SendArgs),
    /// Waits for those who connect.
    Serve(ServeArgs),
}

/// The client's side.
#[derive(clap::Args, Debug)]
pub(crate) struct SendArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    connect: Connect,
    /// For how long to send.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
    /// The server sends.
    #[arg(long)]
    reverse: bool,
    /// Leaves the payload out of the checksums: the rate is then the network's.
    #[arg(long)]
    plain: bool,
    /// Bytes of a frame.
    #[arg(long, value_name = "N", default_value_t = 16384)]
    frame_bytes: usize,
    /// Where the randomness comes from; without it, from anywhere.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A stream that stands still for so long has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    stall_limit: u64,
}

/// The server's side.
#[derive(clap::Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    door: Door,
    /// Ends after one connection, with its result.
    #[arg(long)]
    once: bool,
    /// A stream that stands still for so long has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    stall_limit: u64,
}

/// What the client asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hello {
    seed: u64,
    seconds: u64,
    frame_bytes: usize,
    reverse: bool,
    plain: bool,
}

/// What a receiver saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Received {
    frames: u64,
    lost: u64,
    doubled: u64,
    corrupt: u64,
    /// The last frame came.
    complete: bool,
    /// Why it ended, if not by the last frame.
    error: Option<String>,
    pace: PaceReport,
}

/// What a sender did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Sent {
    frames: u64,
    error: Option<String>,
    pace: PaceReport,
}

/// One side's report; the sender's holds the receiver's, if it came.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct TcpReport {
    load: &'static str,
    ok: bool,
    seed: u64,
    sent: Option<Sent>,
    received: Option<Received>,
}

impl Received {
    fn ok(&self) -> bool {
        self.complete && self.lost == 0 && self.doubled == 0 && self.corrupt == 0
    }
}

impl Report for TcpReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn sentence(&self) -> String {
        let received = self.received.clone().unwrap_or_default();
        format!(
            "tcp: {} frames, {:.1} MiB/s, longest stall {:.1} ms; {} lost, {} doubled, {} corrupt{}",
            received.frames,
            received.pace.mib_per_second,
            received.pace.longest_stall_ms,
            received.lost,
            received.doubled,
            received.corrupt,
            if received.complete {
                ""
            } else {
                "; it broke off"
            },
        )
    }
}

/// The client.
pub(crate) fn send(args: &SendArgs) -> anyhow::Result<TcpReport> {
    let bytes = args.frame_bytes;
    ensure!(
        bytes <= MAX_PAYLOAD,
        "a frame has at most {MAX_PAYLOAD} bytes"
    );
    let mut stream = args
        .target
        .connect(&args.connect, Duration::from_secs(args.stall_limit))?;
    let hello = Hello {
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..)),
        seconds: args.seconds,
        frame_bytes: bytes,
        reverse: args.reverse,
        plain: args.plain,
    };
    writeln!(stream, "{}", serde_json::to_string(&hello)?).context("sending the hello")?;
    Ok(converse(stream, &hello, !args.reverse))
}

/// The server; whether all was well with the last connection.
pub(crate) fn serve(args: &ServeArgs, json: bool) -> anyhow::Result<bool> {
    let listener = args.door.listen()?;
    let patience = Duration::from_secs(args.stall_limit);
    loop {
        let mut stream = listener.accept(patience)?;
        let attend = move || -> anyhow::Result<bool> {
            let hello = read_line(&mut stream).context("the hello")?;
            let mut hello: Hello = serde_json::from_str(&hello).context("the hello")?;
            hello.frame_bytes = hello.frame_bytes.min(MAX_PAYLOAD);
            report::tell(&converse(stream, &hello, hello.reverse), json)
        };
        if args.once {
            return attend();
        }
        std::thread::spawn(move || {
            if let Err(error) = attend() {
                eprintln!("load: {error:#}");
            }
        });
    }
}

/// One side of the stream, from behind the hello.
fn converse(mut stream: Stream, hello: &Hello, sends: bool) -> TcpReport {
    let (sent, received) = if sends {
        let (sent, received) = send_all(&mut stream, hello);
        (Some(sent), received)
    } else {
        let received = receive_all(&mut stream, hello.plain);
        // A sender that is gone doesn't hear it; the report says so anyway.
        let line = serde_json::to_string(&received).unwrap_or_default();
        let _ = writeln!(stream, "{line}");
        (None, Some(received))
    };
    let whole = sent.as_ref().is_none_or(|sent| sent.error.is_none());
    TcpReport {
        load: "tcp",
        ok: whole && received.as_ref().is_some_and(Received::ok),
        seed: hello.seed,
        sent,
        received,
    }
}

fn send_all(stream: &mut Stream, hello: &Hello) -> (Sent, Option<Received>) {
    let mut frames = Frames::new(hello.seed, hello.frame_bytes, hello.plain);
    let mut sent = Sent::default();
    let mut pace = Pace::begin();
    let end = Instant::now() + Duration::from_secs(hello.seconds);
    while sent.error.is_none() && term::goes_on(end) {
        match frames.send(stream, Kind::Load, sent.frames) {
            Ok(()) => {
                sent.frames += 1;
                pace.add(hello.frame_bytes);
            }
            Err(error) => sent.error = Some(error.to_string()),
        }
    }
    sent.pace = pace.end();
    let told = frames
        .send(stream, Kind::End, sent.frames)
        .and_then(|()| read_line(stream));
    match told {
        Ok(line) => (sent, serde_json::from_str(&line).ok()),
        Err(error) => {
            sent.error.get_or_insert_with(|| error.to_string());
            (sent, None)
        }
    }
}

fn receive_all(stream: &mut Stream, plain: bool) -> Received {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    let mut taker = Taker::new(plain);
    let mut received = Received::default();
    let mut pace = Pace::begin();
    let mut expected = 0;
    loop {
        match taker.take(&mut stream) {
            Ok((kind, number, bytes)) => {
                received.lost += number.saturating_sub(expected);
                if kind == Kind::End {
                    // It counts those before it: fewer than came is as wrong as more.
                    received.doubled += expected.saturating_sub(number);
                    received.complete = true;
                    break;
                }
                received.doubled += u64::from(number < expected);
                received.frames += 1;
                expected = expected.max(number.saturating_add(1));
                pace.add(bytes);
            }
            Err(Broken::Payload) => received.corrupt += 1,
            Err(Broken::Head) => {
                received.corrupt += 1;
                received.error = Some("what came is no frame".to_owned());
                break;
            }
            Err(Broken::Stream(error)) => {
                received.error = Some(error.to_string());
                break;
            }
        }
    }
    received.pace = pace.end();
    received
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn serve_once() -> (SocketAddr, std::thread::JoinHandle<bool>) {
        // The kernel picks the port and the server gets the listener's own address.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let hello = read_line(&mut stream).unwrap();
            let hello: Hello = serde_json::from_str(&hello).unwrap();
            let report = converse(Stream::Tcp(stream), &hello, hello.reverse);
            report.ok()
        });
        (address, serving)
    }

    #[test]
    fn a_stream_goes_both_ways() {
        for (reverse, plain) in [(false, false), (true, false), (false, true)] {
            let (address, serving) = serve_once();
            let target = Target {
                addr: Some(address),
                vsock: None,
                unix: None,
            };
            let args = SendArgs {
                target,
                connect: Connect::default(),
                seconds: 1,
                reverse,
                plain,
                frame_bytes: 5000,
                seed: Some(3),
                stall_limit: 60,
            };
            let report = send(&args).unwrap();
            assert!(report.ok() && serving.join().unwrap(), "{report:?}");
            let received = report.received.unwrap();
            assert!(received.frames > 10 && received.pace.bytes == received.frames * 5000);
            assert_eq!(
                received.pace.bytes_per_100_ms.iter().sum::<u64>(),
                received.pace.bytes
            );
        }
    }

    /// What a receiver makes of frames that were made by hand.
    fn receive(bytes: &[u8]) -> Received {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(bytes).unwrap();
        drop(ours);
        receive_all(&mut Stream::Unix(theirs), false)
    }

    #[test]
    fn loss_doubling_corruption_and_breaks_are_told_apart() {
        let mut frames = Frames::new(1, 50, false);
        let mut stream = |numbers: &[u64], end: Option<u64>| {
            let mut bytes = Vec::new();
            for number in numbers {
                bytes.extend(frames.make(Kind::Load, *number));
            }
            bytes.extend(
                end.map(|end| frames.make(Kind::End, end).to_vec())
                    .unwrap_or_default(),
            );
            bytes
        };
        let counts = |received: &Received| (received.lost, received.doubled, received.corrupt);
        let good = receive(&stream(&[0, 1, 2], Some(3)));
        assert!(good.ok() && good.frames == 3);
        assert_eq!(counts(&receive(&stream(&[0, 2], Some(3)))), (1, 0, 0));
        assert_eq!(counts(&receive(&stream(&[0, 1, 1], Some(2)))), (0, 1, 0));
        assert_eq!(counts(&receive(&stream(&[0, 1], Some(4)))), (2, 0, 0));
        let broken = receive(&stream(&[0, 1], None));
        assert!(!broken.ok() && !broken.complete && broken.error.is_some());
        let mut bytes = stream(&[0, 1], Some(2));
        bytes[60] ^= 1;
        let corrupt = receive(&bytes);
        assert!(!corrupt.ok() && corrupt.corrupt == 1, "{corrupt:?}");
        assert!(!receive(b"this is no stream of frames at all").ok());
    }
}
