//! Requests and replies on a VMM's control socket.
//!
//! The socket is `AF_UNIX`, `SOCK_SEQPACKET`; each packet is one JSON object, with file
//! descriptors beside it where the variant says so. A caller sends one request and reads replies
//! until one that is not [`Reply::Progress`]. Callers are of the same uid, or root
//! (`SO_PEERCRED`); all others are cut off.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Policy;
use crate::health::Signs;
use crate::ownership::Epoch;
use crate::rehearsal::Rehearsal;
use crate::report::{Phase, ReleaseName, SwapReport};
use crate::spec::MachineSpec;

/// Version of these messages. Raised only if an old reader would misread a new message.
pub const PROTOCOL: u32 = 1;

/// What can be asked of a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answered by [`Reply::Identity`].
    Hello {
        /// Random text; the reply proves knowledge of the VM's secret with it.
        nonce: String,
    },
    /// What do you run, and how is it? Answered by [`Reply::Description`].
    Describe,
    /// Lend duplicates of the fds that keep the guest alive. Answered by [`Reply::Guest`] with
    /// two fds: guest RAM, ownership page.
    LendGuest,
    /// Press the guest's power button, which asks it to switch itself off. Answered by
    /// [`Reply::Pressed`].
    PressPowerButton,
    /// End the guest and the process. Answered by [`Reply::Done`] before the process exits.
    PowerOff,
    /// Hand the guest over. With two fds: the predecessor's end of the handover socketpair (the
    /// other end is the successor's), and an empty, sealable memfd for the saved state, which
    /// the sender keeps a duplicate of. Answered by [`Reply::Handover`] after any number of
    /// [`Reply::Progress`].
    HandOver {
        /// Id of the swap; travels into both processes' logs and the report.
        swap: String,
        /// The successor's release.
        to: ReleaseName,
        /// The longest blackout allowed; the VM's own budget when absent.
        budget_ns: Option<u64>,
        /// The longest the preparation may take while the guest runs.
        #[serde(rename = "brownout_ns", with = "crate::nanos")]
        brownout: Duration,
        /// What the guest's clocks make of the pause; the VM's own policy when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clock: Option<Policy>,
    },
    /// Have the guest stand still in its place, all its state kept, while something of the host is
    /// changed. Answered by [`Reply::Frozen`] once it stands still.
    Freeze {
        /// Id of the swap of the host, for logs and the report.
        swap: String,
        /// The longest it stands still: then it runs on, whoever has died meanwhile.
        #[serde(rename = "ceiling_ns", with = "crate::nanos")]
        ceiling: Duration,
    },
    /// Have the guest stand still, keep its state in its process's memory, and let go of KVM: no file
    /// descriptor of KVM stays open, while RAM stays mapped and devices' files stay open. Answered by
    /// [`Reply::Detached`]; also of a guest that was rebuilt and has not run since.
    Detach {
        /// Id of the swap of the host.
        swap: String,
        /// The longest it stands still: then it is rebuilt on whatever KVM there is, and runs on,
        /// whoever has died meanwhile.
        #[serde(rename = "ceiling_ns", with = "crate::nanos")]
        ceiling: Duration,
    },
    /// Rebuild the virtual machine of a guest that has let go of KVM. It does not run yet. Answered by
    /// [`Reply::Rebuilt`]; on an error the guest is as it was before, and this can be asked again.
    Rebuild {
        /// Id of the swap.
        swap: String,
    },
    /// As [`Request::Freeze`], with the guest's state stored beside its RAM in the host's carve-out, for
    /// a jump into another kernel. Answered by [`Reply::Stored`] once both are so. If nobody jumps, the
    /// guest runs on at the ceiling: what was stored is withdrawn first.
    Store {
        /// Id of the swap of the host.
        swap: String,
        /// The jump's nonce.
        nonce: String,
        /// The longest it stands still.
        #[serde(rename = "ceiling_ns", with = "crate::nanos")]
        ceiling: Duration,
    },
    /// The jump comes now: the ceiling of a guest that is stored for it begins anew, with this length, so
    /// that it does not run on while the kernel that runs it shuts down. Answered by [`Reply::Done`].
    AwaitJump {
        /// Id of the swap.
        swap: String,
        /// The longest it stands still from now on.
        #[serde(rename = "ceiling_ns", with = "crate::nanos")]
        ceiling: Duration,
    },
    /// Have the guest run on that stands still for this swap, rebuilt first if it has let go of KVM.
    /// Answered by [`Reply::Resumed`], also if it runs on already, for whatever reason.
    Resume {
        /// Id of the swap.
        swap: String,
    },
    /// Rehearse a swap: have a throw-away process of another release build this machine over a
    /// private view of guest RAM, and, with `peek`, load the guest's state as it is now and save it
    /// again. With one fd: our end of a socketpair, whose other end that process has. The guest
    /// runs on meanwhile, but for the peek. Answered by [`Reply::Rehearsed`].
    Rehearse {
        /// Whether its state is saved, for which the guest stands still a moment.
        peek: bool,
        /// The longest that it may stand still; the VM's own budget when absent.
        budget_ns: Option<u64>,
        /// The longest that all of it may take.
        #[serde(rename = "patience_ns", with = "crate::nanos")]
        patience: Duration,
        /// What the guest's clocks would make of the pause; the VM's own policy when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clock: Option<Policy>,
        /// A jump of the host is rehearsed: the state goes as a record that is stored by this nonce, which is no
        /// jump's. A swap of the VMM when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nonce: Option<String>,
    },
    /// Are guest and VMM well? Answered by [`Reply::Signs`].
    Signs,
    /// The report of the last swap that this process came out of, as successor or as a
    /// predecessor that kept its guest. Answered by [`Reply::Report`].
    LastReport,
}

/// What a VMM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Identity {
        /// [`PROTOCOL`].
        protocol: u32,
        /// The machine's name.
        name: String,
        /// The process.
        process: ProcessId,
        /// Proof by the VM's secret, see [`crate::secret`].
        proof: String,
    },
    /// To [`Request::Describe`].
    Description(Box<Description>),
    /// To [`Request::LendGuest`]; the fds lie beside it.
    Guest,
    /// To [`Request::PressPowerButton`].
    Pressed {
        /// The guest has taken note of it. One that has not, as a rule, never will: it has no driver
        /// for the button.
        heard: bool,
    },
    /// The request was carried out.
    Done,
    /// A phase of a handover ended (only phases outside the blackout are told at once).
    Progress(Phase),
    /// The handover is over for this process.
    Handover(Handover),
    /// To [`Request::Freeze`]: the guest stands still.
    Frozen,
    /// To [`Request::Detach`]: the guest stands still, and KVM is let go of.
    Detached,
    /// To [`Request::Rebuild`]: there is a machine again, with the guest's state in it.
    Rebuilt,
    /// To [`Request::Store`]: the guest stands still, and its state lies beside its RAM.
    Stored {
        /// Bytes of the state.
        state_bytes: u64,
        /// From the kick to this answer.
        #[serde(rename = "took_ns", with = "crate::nanos")]
        took: Duration,
    },
    /// To [`Request::Resume`]: the guest runs, and this was its pause.
    Resumed {
        /// The report.
        report: Box<SwapReport>,
    },
    /// To [`Request::Rehearse`].
    Rehearsed(Box<Rehearsal>),
    /// To [`Request::Signs`].
    Signs(Box<Signs>),
    /// To [`Request::LastReport`].
    Report {
        /// The report; `None` while the successor is still measuring, or if there was no swap.
        report: Option<Box<SwapReport>>,
    },
    /// The request was refused or failed; the guest is as it was.
    Error {
        /// A word for programs: `busy`, `not_running`, `bad_request`, `failed`.
        code: String,
        /// What, why, and what to do.
        message: String,
    },
}

/// How a handover ended as the predecessor saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Handover {
    /// The successor took the guest. The full report is the successor's
    /// ([`Request::LastReport`]); this process exits.
    Moved,
    /// The guest goes on here. The report says why.
    Kept {
        /// Everything measured up to there.
        report: Box<SwapReport>,
    },
}

/// Which process this is, beyond what a recycled pid could fake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/PID/stat` field 22).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessId {
    /// Of the process with this pid, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name (field 2) may hold anything, blanks and brackets included.
        let after_name = stat.rsplit_once(')')?.1;
        let start_ticks = after_name.split_ascii_whitespace().nth(19)?.parse().ok()?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(Self {
            pid,
            start_ticks,
            boot_id: boot_id.trim().to_owned(),
        })
    }

    /// Whether that very process still lives.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

/// What a VMM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The machine.
    pub spec: MachineSpec,
    /// This process's release.
    pub release: ReleaseName,
    /// What the guest does.
    pub state: GuestState,
    /// Epoch under which this process owns the guest.
    pub epoch: Epoch,
    /// Swaps this guest has lived through.
    pub swaps: u64,
    /// Formats of saved state this release reads.
    pub reads: Vec<u32>,
    /// Formats it writes, preferred first.
    pub writes: Vec<u32>,
    /// Id of the last swap this process came out of.
    pub last_swap: Option<String>,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// Its vCPUs run.
    Running,
    /// It is being handed over.
    Swapping,
    /// It stands still in its place.
    Frozen,
    /// It powered itself off, or was powered off.
    Stopped,
}

/// What a process that was started to run a guest says on its ready fd, once, before it closes
/// it: the line `{"ready":...}` of JSON. A process that dies without a word has crashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ready", rename_all = "snake_case")]
pub enum Ready {
    /// `run`: the guest runs. `adopt`: the successor waits for its predecessor.
    Yes,
    /// It could not start.
    No {
        /// What, why, and what to do.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let me = ProcessId::of(std::process::id()).expect("own stat");
        assert!(me.is_alive());
        let other = ProcessId {
            start_ticks: me.start_ticks + 1,
            ..me
        };
        assert!(
            !other.is_alive(),
            "the same pid at another time is another process"
        );
    }

    #[test]
    fn requests_read_as_documented() {
        let json = serde_json::to_string(&Request::Hello { nonce: "n".into() }).expect("json");
        assert_eq!(json, r#"{"request":"hello","nonce":"n"}"#);
        let json = serde_json::to_string(&Ready::No { error: "x".into() }).expect("json");
        assert_eq!(json, r#"{"ready":"no","error":"x"}"#);
    }
}
