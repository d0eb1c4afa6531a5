//! The device against a driver, and against programs at real sockets.

mod echo;
mod guest;
mod hostile;
mod laws;
mod streams;
mod swaps;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::packet::Op;
use super::*;
use crate::devices::virtio::driver::{Driver, PATIENCE};
use guest::Guest;

/// The guest's context id.
const CID: u32 = 42;

/// A device, its directory, and a guest that uses it.
struct Place {
    dir: TempDir,
    driver: Driver,
    guest: Guest,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let listener = listen(dir.path()).expect("listener");
        let kind = Vsock::new(CID, listener, dir.path());
        let driver = Driver::boot("vsock", Box::new(kind));
        let guest = Guest::start(&driver);
        Self { dir, driver, guest }
    }

    /// A place whose guest has not given the device any buffers.
    fn starving() -> Self {
        let mut place = Self::new();
        place.guest = Guest::starve(&place.driver);
        place
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join(SOCKET)
    }

    /// A host program that connects.
    fn call(&self) -> UnixStream {
        patient(UnixStream::connect(self.socket()).expect("connect"))
    }

    /// A host program that listens for the guest.
    fn serve(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("{SOCKET}_{port}"));
        UnixListener::bind(path).expect("bind")
    }

    /// A connection to the guest's `port`, with the host program's end.
    fn connected(&mut self, port: u32) -> (guest::Stream, BufReader<UnixStream>) {
        let mut program = self.call();
        writeln!(program, "CONNECT {port}").expect("write");
        let stream = self.guest.accept(port);
        let mut program = BufReader::new(program);
        assert_eq!(
            line(&mut program),
            format!("OK {}\n", stream.ports.host),
            "the guest accepted"
        );
        (stream, program)
    }

    /// The guest sends until the host's socket, and the room behind it, are full. Gives how much.
    fn fill(&mut self, stream: &mut guest::Stream) -> usize {
        let mut sent = 0;
        loop {
            let len = stream.credit() as usize;
            if len > 0 {
                self.guest.send(stream, &pattern_of(sent..sent + len));
                sent += len;
            }
            self.guest.tell(stream, Op::CreditRequest);
            stream.hear(&self.guest.hear_op(Op::CreditUpdate));
            if stream.credit() == 0 {
                return sent;
            }
        }
    }

    /// Another VMM takes over; `lose` says which lent files don't arrive.
    fn swap_but(self, lose: impl Fn(&str) -> bool) -> Self {
        let Self { dir, driver, guest } = self;
        let driver =
            driver.swap(|state, files| Box::new(take_over(dir.path(), state, files, lose)));
        Self { dir, driver, guest }
    }

    fn swap(self) -> Self {
        self.swap_but(|_| false)
    }
}

fn take_over(
    dir: &Path,
    state: &mut Unclaimed,
    files: &mut Borrowed,
    lose: impl Fn(&str) -> bool,
) -> Vsock {
    let listener = files.take("vsock/listener").expect("listener");
    for (rest, fd) in files.take_all("vsock/") {
        let name = format!("vsock/{rest}");
        if !lose(&name) {
            files.add(vec![name], vec![fd]);
        }
    }
    Vsock::restore(CID, listener, dir, "vsock", state, files).expect("restore")
}

/// Has a program fail rather than wait for ever.
fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn line(program: &mut impl BufRead) -> String {
    let mut line = String::new();
    program.read_line(&mut line).expect("a line");
    line
}

fn read_all(program: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    program.read_to_end(&mut bytes).expect("read to the end");
    bytes
}

fn read(program: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    program.read_exact(&mut bytes).expect("read");
    bytes
}

/// The byte at an offset of a stream, so that one lost, doubled or moved shows.
fn pattern(offset: usize) -> u8 {
    (offset.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn pattern_of(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(pattern).collect()
}
