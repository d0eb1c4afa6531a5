//! Fault points: a closed list of places in a handover where a build with the feature
//! `fault-injection` can be made to fail. Without the feature there is nothing here at all.

/// A place in a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Successor: before it says that it is ready to load.
    Adopt,
    /// Successor: saved state has come, nothing is loaded.
    Load,
    /// Successor: loaded, before it says so.
    Loaded,
    /// Successor: the guest was given up, and is not taken yet.
    Take,
    /// Successor: the guest is taken, and no vCPU has entered.
    Taken,
    /// Successor: the guest runs, which was not said yet.
    Entered,
    /// Rehearsal: saved state has come, nothing is loaded.
    Rehearsing,
    /// Predecessor: the guest is offered, and runs.
    Offered,
    /// Predecessor: all vCPUs parked.
    Frozen,
    /// Predecessor: state saved, and not sealed.
    Saved,
    /// Predecessor: state saved and sealed.
    Sealed,
    /// Predecessor: the guest is given up, which was not said yet.
    GivenUp,
    /// Predecessor: the guest runs elsewhere; the report was not sent yet.
    Retiring,
}

impl Point {
    /// All of them, as they are written.
    pub const ALL: [(&'static str, Self); 13] = [
        ("adopt", Self::Adopt),
        ("load", Self::Load),
        ("loaded", Self::Loaded),
        ("take", Self::Take),
        ("taken", Self::Taken),
        ("entered", Self::Entered),
        ("rehearsing", Self::Rehearsing),
        ("offered", Self::Offered),
        ("frozen", Self::Frozen),
        ("saved", Self::Saved),
        ("sealed", Self::Sealed),
        ("given-up", Self::GivenUp),
        ("retiring", Self::Retiring),
    ];
}

/// A measure that a build for tests can be made to leave out, or a defect that it can be made to
/// have: the checks must then fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoilt {
    /// kvmclock is set once, and not in a loop (`spoil=loop`).
    Loop,
    /// kvmclock is set a millisecond off its line (`spoil=clock`).
    Clock,
    /// TSC offsets are a thousand cycles off (`spoil=offset`).
    Offset,
    /// The guest is not told that it stood still (`spoil=watchdogs`).
    Watchdogs,
    /// The masterclock updates that making vCPUs asks for are left to wait (`spoil=latecomers`).
    Latecomers,
    /// The predecessor runs on the guest that it gave up (`spoil=ownership`): two run it.
    Ownership,
    /// A guest that was handed over is not run, though all is said to be well (`spoil=vcpu`).
    Vcpu,
    /// Devices take nothing from their queues (`spoil=queue`).
    Queue,
    /// A register of a device is another after it was loaded (`spoil=state`).
    State,
    /// A successor's page tables are left to be filled by faults (`spoil=populate`).
    Populate,
    /// KVM's own page tables are left to be filled by faults (`spoil=pre-fault`).
    PreFault,
    /// Saved state is refused (`spoil=load`): what such a release does only after the freeze, and a
    /// rehearsal before it.
    Load,
    /// A guest's record is left as it was by who runs the guest from it (`spoil=mark`): two could.
    Mark,
}

#[cfg(not(feature = "fault-injection"))]
mod imp {
    /// Never.
    #[inline]
    pub fn is_spoilt(_: super::Spoilt) -> bool {
        false
    }

    /// Does nothing, and costs nothing.
    #[inline]
    pub fn reach(_: super::Point) -> Result<(), &'static str> {
        Ok(())
    }

    /// Of no interest.
    #[inline]
    pub fn stands_still_since(_: impl FnOnce() -> std::time::Duration) {}
}

#[cfg(feature = "fault-injection")]
mod imp {
    use super::{Point, Spoilt};
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::{Duration, Instant};

    static SPOILT: OnceLock<Spoilt> = OnceLock::new();
    /// At most one for each point.
    static ARMED: Mutex<Vec<(Point, Action)>> = Mutex::new(Vec::new());
    /// When the guest came to a standstill.
    static STILL: OnceLock<Instant> = OnceLock::new();

    #[derive(Clone, Copy, Debug)]
    enum Action {
        Crash,
        Hang,
        Fail,
        Panic,
        Slow(Duration),
        /// Waits until the guest has stood still for so long, however long the rest took.
        Until(Duration),
        /// Stands still, all threads of it, until somebody outside lets it go on: so that things
        /// can be done to it, or to others, just then.
        Stop,
    }

    /// Whether this measure is left out.
    pub fn is_spoilt(what: Spoilt) -> bool {
        SPOILT.get() == Some(&what)
    }

    /// Tells how long ago the guest came to a standstill.
    pub fn stands_still_since(ago: impl FnOnce() -> Duration) {
        let _ = STILL.set(
            Instant::now()
                .checked_sub(ago())
                .unwrap_or_else(Instant::now),
        );
    }

    /// Arms faults, a comma between them: for each point one written `point=crash`, `=hang`, `=fail`,
    /// `=panic`, `=stop`, `=slow:MILLISECONDS` or `=until:MILLISECONDS`, and one `spoil=MEASURE`.
    pub fn arm(text: &str) -> Result<(), String> {
        text.split(',').try_for_each(arm_one)
    }

    fn arm_one(text: &str) -> Result<(), String> {
        let bad = || format!("`{text}` is no fault; write for example load=crash or take=slow:50");
        let (point, action) = text.split_once('=').ok_or_else(bad)?;
        if point == "spoil" {
            let measure = match action {
                "loop" => Spoilt::Loop,
                "clock" => Spoilt::Clock,
                "offset" => Spoilt::Offset,
                "watchdogs" => Spoilt::Watchdogs,
                "latecomers" => Spoilt::Latecomers,
                "ownership" => Spoilt::Ownership,
                "vcpu" => Spoilt::Vcpu,
                "queue" => Spoilt::Queue,
                "state" => Spoilt::State,
                "populate" => Spoilt::Populate,
                "pre-fault" => Spoilt::PreFault,
                "load" => Spoilt::Load,
                "mark" => Spoilt::Mark,
                _ => return Err(bad()),
            };
            return SPOILT
                .set(measure)
                .map_err(|_| "only one measure can be spoilt at a time".to_owned());
        }
        let named = Point::ALL.iter().find(|(name, _)| *name == point);
        let (_, point) = *named.ok_or_else(bad)?;
        let action = match action {
            "crash" => Action::Crash,
            "hang" => Action::Hang,
            "fail" => Action::Fail,
            "panic" => Action::Panic,
            "stop" => Action::Stop,
            other => {
                let (how, ms) = other.split_once(':').ok_or_else(bad)?;
                let time = Duration::from_millis(ms.parse().map_err(|_| bad())?);
                match how {
                    "slow" => Action::Slow(time),
                    // Nobody else knows yet when the guest came to a standstill.
                    "until" if matches!(point, Point::Loaded | Point::Take | Point::Taken) => {
                        Action::Until(time)
                    }
                    _ => return Err(bad()),
                }
            }
        };
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.iter().any(|(other, _)| *other == point) {
            return Err("only one fault at a time and point".to_owned());
        }
        armed.push((point, action));
        Ok(())
    }

    fn armed(point: Point) -> Option<Action> {
        let armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        let here = armed.iter().find(|(other, _)| *other == point);
        here.map(|(_, action)| *action)
    }

    /// Fails here if this point is armed.
    pub fn reach(point: Point) -> Result<(), &'static str> {
        match armed(point) {
            Some(Action::Crash) => std::process::abort(),
            Some(Action::Hang) => loop {
                std::thread::park();
            },
            Some(Action::Fail) => Err("a fault was injected here"),
            Some(Action::Panic) => panic!("a panic was injected here"),
            Some(Action::Slow(time)) => {
                std::thread::sleep(time);
                Ok(())
            }
            Some(Action::Until(time)) => {
                let since = STILL.get().map(Instant::elapsed);
                std::thread::sleep(time.saturating_sub(since.unwrap_or_default()));
                Ok(())
            }
            Some(Action::Stop) => {
                let us = rustix::process::getpid();
                let stopped = rustix::process::kill_process(us, rustix::process::Signal::STOP);
                stopped.map_err(|_| "it could not stop itself")
            }
            None => Ok(()),
        }
    }
}

#[cfg(feature = "fault-injection")]
pub use imp::arm;
pub use imp::{is_spoilt, reach, stands_still_since};
