//! Megabytes both ways, and swaps in the middle of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::super::packet::{NO_MORE, NO_MORE_OUT, Op};
use super::guest::{Packet, Stream};
use super::*;

const ECHO_PORT: u32 = 7;
const SOURCE_PORT: u32 = 5000;

/// A generator of sizes; its seed is part of a failed test's output.
struct Dice(u64);

impl Dice {
    /// From 1 to `most`, small ones as often as large ones.
    fn size(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bits = usize::BITS - most.leading_zeros();
        let most = most.min(1 << ((self.0 >> 32) % u64::from(bits + 1)));
        1 + (self.0 as usize >> 8) % most
    }
}

/// What the programs and the guest do: how much at least, and until when.
#[derive(Clone)]
struct Plan {
    least: usize,
    swapping: Arc<AtomicBool>,
    echoed: Arc<AtomicUsize>,
    seed: u64,
}

impl Plan {
    fn goes_on(&self, sent: usize) -> bool {
        sent < self.least || self.swapping.load(Ordering::SeqCst)
    }
}

/// Writes a pattern and reads it back, at paces of their own.
fn source(program: BufReader<UnixStream>, plan: &Plan) -> JoinHandle<usize> {
    let mut writer = program.get_ref().try_clone().expect("dup");
    let (ours, seed) = (plan.clone(), plan.seed);
    let written = std::thread::spawn(move || {
        let (mut dice, mut sent) = (Dice(seed), 0);
        while ours.goes_on(sent) {
            let end = sent + dice.size(100_000);
            writer.write_all(&pattern_of(sent..end)).expect("write");
            sent = end;
        }
        writer
            .shutdown(std::net::Shutdown::Write)
            .expect("shutdown");
        sent
    });
    let (mut reader, plan) = (program, plan.clone());
    std::thread::spawn(move || {
        let (mut dice, mut had) = (Dice(plan.seed + 1), 0);
        let mut bytes = vec![0; 100_000];
        loop {
            let room = dice.size(bytes.len());
            let got = reader.read(&mut bytes[..room]).expect("read");
            if got == 0 {
                break;
            }
            assert!(
                bytes[..got] == pattern_of(had..had + got),
                "at {had} of seed {}",
                plan.seed
            );
            had += got;
            plan.echoed.fetch_add(got, Ordering::SeqCst);
        }
        assert_eq!(had, written.join().expect("writer"));
        had
    })
}

/// Echoes what the guest sends.
fn echo(listener: UnixListener, seed: u64) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut program = patient(listener.accept().expect("accept").0);
        let mut dice = Dice(seed + 2);
        let mut bytes = vec![0; 100_000];
        loop {
            let room = dice.size(bytes.len());
            match program.read(&mut bytes[..room]).expect("read") {
                0 => return,
                got => program.write_all(&bytes[..got]).expect("write"),
            }
        }
    })
}

/// The guest's two programs: one echoes, one writes a pattern and reads it back.
struct Programs {
    guest: Guest,
    plan: Plan,
    dice: Dice,
    echo: Stream,
    echoing: Vec<u8>,
    echo_ended: bool,
    echo_shut: bool,
    source: Stream,
    sent: usize,
    had: usize,
    source_ended: bool,
    over: usize,
}

impl Programs {
    fn run(mut self) -> (Guest, usize) {
        while self.over < 2 {
            let did = self.echo() | self.source();
            let packet = match self.guest.poll() {
                Some(packet) => packet,
                None if did => continue,
                None => self.guest.hear(),
            };
            self.hear(&packet);
        }
        assert_eq!(self.had, self.sent);
        (self.guest, self.had)
    }

    fn hear(&mut self, packet: &Packet) {
        let echo = packet.ports() == self.echo.ports;
        let stream = match echo {
            true => &mut self.echo,
            false => &mut self.source,
        };
        if packet.op() != Op::Reset {
            stream.hear(packet);
        }
        match packet.op() {
            Op::Data => {
                // A program that reads at once; half the time it says so at once.
                stream.taken = stream.taken.wrapping_add(packet.header.len);
                if self.dice.size(8) < 4 {
                    let stream = *stream;
                    self.guest.tell(&stream, Op::CreditUpdate);
                }
                if echo {
                    self.echoing.extend(&packet.data);
                } else {
                    let end = self.had + packet.data.len();
                    let expected = pattern_of(self.had..end);
                    assert!(
                        packet.data == expected,
                        "at {} of seed {}",
                        self.had,
                        self.plan.seed
                    );
                    self.had = end;
                    self.plan
                        .echoed
                        .fetch_add(packet.data.len(), Ordering::SeqCst);
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => {
                let stream = *stream;
                self.guest.tell(&stream, Op::CreditUpdate);
            }
            Op::Shutdown if echo => self.echo_ended = true,
            // The host's echo has read all and is gone.
            Op::Shutdown => {
                assert_eq!(packet.header.flags, NO_MORE);
                self.guest.tell(&self.source, Op::Reset);
                self.over += 1;
            }
            Op::Reset => {
                assert!(echo && self.echo_ended && self.echoing.is_empty());
                self.over += 1;
            }
            op => panic!("{op:?} for {:?}", packet.ports()),
        }
    }

    fn echo(&mut self) -> bool {
        let room = self.echo.credit() as usize;
        let len = self.echoing.len().min(room).min(60_000);
        if len > 0 {
            let len = self.dice.size(len);
            let data: Vec<_> = self.echoing.drain(..len).collect();
            self.guest.send(&mut self.echo, &data);
            return true;
        }
        if self.echo_ended && self.echoing.is_empty() && !self.echo_shut {
            self.echo_shut = true;
            self.guest.shut(&self.echo, NO_MORE);
        }
        false
    }

    fn source(&mut self) -> bool {
        if self.source_ended {
            return false;
        }
        if !self.plan.goes_on(self.sent) {
            self.source_ended = true;
            self.guest.shut(&self.source, NO_MORE_OUT);
            return true;
        }
        let room = self.source.credit() as usize;
        if room == 0 {
            return false;
        }
        let end = self.sent + self.dice.size(room.min(60_000));
        self.guest
            .send(&mut self.source, &pattern_of(self.sent..end));
        self.sent = end;
        true
    }
}

/// Two connections echo at least `least` bytes each, and for as long as `swaps` take. Tells how
/// many bytes that were.
fn run(least: usize, swaps: usize, seed: u64) -> usize {
    let mut place = Place::new();
    let plan = Plan {
        least,
        swapping: Arc::new(AtomicBool::new(swaps > 0)),
        echoed: Arc::default(),
        seed,
    };
    let echo_thread = echo(place.serve(SOURCE_PORT), seed);
    let source_stream = place.guest.connect(SOURCE_PORT, 33);
    let (echo_stream, program) = place.connected(ECHO_PORT);
    let source_thread = source(program, &plan);
    let Place {
        dir,
        mut driver,
        guest,
    } = place;
    let programs = Programs {
        guest,
        plan: plan.clone(),
        dice: Dice(seed + 3),
        echo: echo_stream,
        echoing: Vec::new(),
        echo_ended: false,
        echo_shut: false,
        source: source_stream,
        sent: 0,
        had: 0,
        source_ended: false,
        over: 0,
    };
    let guest_thread = std::thread::spawn(move || programs.run());
    let mut before = 0;
    for _ in 0..swaps {
        driver =
            driver.swap(|state, files| Box::new(take_over(dir.path(), state, files, |_| false)));
        // Each swap has some of the load to itself.
        while plan.echoed.load(Ordering::SeqCst) == before && !guest_thread.is_finished() {
            std::thread::yield_now();
        }
        before = plan.echoed.load(Ordering::SeqCst);
    }
    plan.swapping.store(false, Ordering::SeqCst);
    let (_guest, had) = guest_thread.join().expect("guest");
    echo_thread.join().expect("echo");
    let echoed = source_thread.join().expect("source");
    assert!(!driver.has_failed());
    had + echoed
}

#[test]
fn megabytes_are_echoed_both_ways() {
    for seed in [1, 2] {
        assert!(run(4 << 20, 0, seed) >= 8 << 20);
    }
}

#[test]
fn two_hundred_swaps_in_the_middle_of_it() {
    let echoed = run(4 << 20, 200, 3);
    assert!(echoed >= 8 << 20, "{echoed}");
}
