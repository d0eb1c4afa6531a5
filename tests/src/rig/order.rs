//! What the host's init is told, and what it answers: two JSON files, and lines on its console.

use serde::{Deserialize, Serialize};

/// Where the order lies in the initramfs.
pub const ORDER: &str = "/rig/order.json";
/// The root of a work tree on the host, for a harness that runs there (`STILLPOINT_ROOT`).
pub const ROOT: &str = "/stillpoint";
/// What every line of the host's init begins with.
pub const MARK: &str = "rig-init: ";
/// The serial number of the disk that results are written to.
pub const RESULTS_DISK: &str = "results";
/// The serial number of the disk that is mounted at `/scratch`.
pub const SCRATCH_DISK: &str = "scratch";
/// The carve-out, where the order has one.
pub const CARVE_OUT: &str = "/dev/dax0.0";
/// Where the kernels lie that a host can jump into, each in a folder of its name.
pub const JUMPS: &str = "/jump";
/// The file in the results that holds the [`Answer`].
pub const ANSWER: &str = "answer.json";
/// Where init leaves its [`Stamps`].
pub const STAMPS: &str = "/run/rig-stamps.json";
/// How long init may oversleep before it says that the host stood still.
pub const STILL_S: u64 = 10;

/// One command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// When all must be over, if it must. The host powers itself off some time after that, should
    /// nobody be left to stop it.
    pub time_limit_s: Option<u64>,
    /// Memory was left alone for a carve-out, which is to become a device-dax.
    #[serde(default)]
    pub carve_out: bool,
    /// This kernel was jumped into: the scratch disk is as the one before left it.
    #[serde(default)]
    pub jumped: bool,
    /// Servers outside the host, if it has a network.
    #[serde(default)]
    pub outside: Option<Outside>,
}

/// Servers that are no part of the host, as it reaches them: addresses with their ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// Sends back what it is sent.
    pub echo: String,
    /// Answers each byte with the time.
    pub clock: String,
}

/// When init was how far, by the TSC, which counts on over a kexec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamps {
    /// It began.
    pub init: u64,
    /// Every module was loaded, and `/dev/kvm` was open; absent where there is none.
    pub kvm: Option<u64>,
    /// The command was started.
    pub command: u64,
}

/// How the command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Its exit status; of a signal, 128 more than its number.
    pub status: i32,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            command: vec!["true".into()],
            time_limit_s: Some(120),
            carve_out: false,
            jumped: false,
            outside: None,
        }
    }
}

/// A shell at the console, on a terminal of this many rows and columns.
pub fn shell(size: Option<(u16, u16)>) -> Vec<String> {
    let (rows, columns) = size.filter(|size| size.0 > 0).unwrap_or((24, 80));
    let script = format!(
        "stty rows {rows} cols {columns}; cd /root; \
         echo; echo 'stillpoint and stillpointd are in the PATH, guest images under /images.'; \
         echo 'Start with:  stillpointd 2>/tmp/stillpointd.log &   then   stillpoint doctor'; echo; exec sh -l"
    );
    ["setsid", "cttyhack", "sh", "-c", &script]
        .map(str::to_owned)
        .to_vec()
}
