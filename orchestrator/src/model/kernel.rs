//! A jump of the host into another kernel: what is asked, what became of it, and the command line of
//! the kernel that is jumped into. Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The parameter of the next kernel's command line that names the jump.
pub const JUMP: &str = "stillpoint.jump=";
/// The longest command line, bytes (x86's `COMMAND_LINE_SIZE`, less its terminator).
const MAX_COMMAND_LINE: usize = 2047;

/// A jump, as a part of its swap's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KernelJump {
    /// The kernel's image.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// Its initial RAM disk.
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Its command line, without the jump's own parameter.
    pub command_line: String,
    /// What the directory beside the guests' memory and the next kernel's command line have in common.
    pub nonce: String,
    /// The guests' revival is rehearsed before they stand still, and the jump not begun where that fails.
    #[serde(default)]
    pub rehearse: bool,
    /// The kernel that is left (`uname -r`).
    pub from: String,
    /// The kernel that it came to; absent while it is not known to have come anywhere.
    #[serde(default)]
    pub to: Option<String>,
    /// What took how long.
    #[serde(default)]
    pub phases: Vec<JumpPhase>,
    /// What became of the host's wall clock.
    #[serde(default)]
    pub clock: Option<WallCorrection>,
}

/// Whose time a phase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// Ours.
    Ours,
    /// The kernels': the shutdown of one, the boot of the other, and what its user space starts before us.
    Kernel,
}

/// A phase of a jump, for the host as a whole; each guest's own are in its report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JumpPhase {
    /// `load`, `rehearse`, `preserve`, `store`, `sync`, `kernel`, `start`, `open`, `clock`, `adopt`.
    pub name: String,
    /// Whose time it is.
    pub share: Share,
    /// Whether guests stood still meanwhile.
    pub in_blackout: bool,
    /// How long.
    pub duration_ns: u64,
}

/// What became of the host's wall clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WallCorrection {
    /// What the new kernel's clock was off, ns.
    pub off_ns: Option<i64>,
    /// What is left of that, ns.
    pub left_ns: Option<i64>,
    /// It can't be told better than this, ns.
    pub uncertain_ns: Option<u64>,
    /// Why it was not corrected.
    pub problem: Option<String>,
}

/// The nonce of the jump that a kernel with this command line came by.
pub fn nonce_of(command_line: &str) -> Option<&str> {
    let words = command_line.split_ascii_whitespace();
    words
        .rev()
        .find_map(|word| word.strip_prefix(JUMP))
        .filter(|nonce| !nonce.is_empty())
}

/// A command line without what belongs to its own boot: an earlier jump, and what a boot loader put in.
pub fn to_be_used_again(command_line: &str) -> String {
    let of_its_boot = |word: &&str| {
        let own = [JUMP, "BOOT_IMAGE=", "initrd="];
        !own.iter().any(|own| word.starts_with(own))
    };
    let words = command_line.split_ascii_whitespace().filter(of_its_boot);
    words.collect::<Vec<_>>().join(" ")
}

/// The next kernel's command line, with the jump named in it.
pub fn with_nonce(command_line: &str, nonce: &str) -> String {
    format!("{command_line} {JUMP}{nonce}")
        .trim_start()
        .to_owned()
}

/// Why the kernel with this command line would not find the guests' memory: a part that the running one
/// leaves alone (`memmap=SIZE!AT` or `memmap=SIZE$AT`), and the next would not.
pub fn forgets_memory(running: &str, next: &str) -> Option<String> {
    let carved = |line: &str| -> Vec<String> {
        let words = line.split_ascii_whitespace();
        let maps = words.filter_map(|word| word.strip_prefix("memmap="));
        let parts = maps.flat_map(|list| list.split(','));
        let kept = parts.filter(|part| part.contains('!') || part.contains('$'));
        kept.map(str::to_owned).collect()
    };
    let next = carved(next);
    let missing = carved(running)
        .into_iter()
        .find(|part| !next.contains(part))?;
    Some(format!(
        "the next kernel's command line lacks `memmap={missing}`, which the running one has: the next \
         would use that memory for itself"
    ))
}

/// Why the kernel with this command line would not look for what live update keeps for it: it lacks a word by which
/// the running one has live update (`kho=`, `liveupdate=`).
pub fn forgets_live_update(running: &str, next: &str) -> Option<String> {
    let words = |line: &str| -> Vec<String> {
        let words = line.split_ascii_whitespace();
        let ours = words.filter(|word| word.starts_with("kho=") || word.starts_with("liveupdate="));
        ours.map(str::to_owned).collect()
    };
    let next = words(next);
    let missing = words(running)
        .into_iter()
        .find(|word| !next.contains(word))?;
    Some(format!(
        "the next kernel's command line lacks `{missing}`, which the running one has: the next would use the \
         guests' memory for itself"
    ))
}

/// Why this can't be a command line; `None` if it can.
pub fn bad_command_line(text: &str) -> Option<String> {
    if text.len() > MAX_COMMAND_LINE {
        let len = text.len();
        return Some(format!(
            "{len} bytes with the jump's own parameter, {MAX_COMMAND_LINE} at most"
        ));
    }
    let printable = text
        .bytes()
        .all(|b| b == b'\t' || (0x20..0x7f).contains(&b));
    (!printable).then(|| "it holds a character that is not printable ASCII".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_kernel_is_told_of_the_last_jump_alone() {
        let first = "BOOT_IMAGE=/vmlinuz root=/dev/vda1 memmap=1G!4G quiet initrd=x";
        let next = with_nonce(&to_be_used_again(first), "abc");
        assert_eq!(
            next,
            "root=/dev/vda1 memmap=1G!4G quiet stillpoint.jump=abc"
        );
        assert_eq!(nonce_of(&next), Some("abc"));
        let again = with_nonce(&to_be_used_again(&next), "def");
        assert_eq!(nonce_of(&again), Some("def"));
        assert_eq!(again.matches(JUMP).count(), 1);
        assert_eq!(nonce_of(first), None);
        assert_eq!(nonce_of("stillpoint.jump="), None);
        assert_eq!(with_nonce("", "x"), "stillpoint.jump=x");
    }

    #[test]
    fn memory_that_the_next_kernel_would_take_is_named() {
        let running = "memmap=1G!4G,512M$8G memmap=64M@1G quiet";
        assert_eq!(forgets_memory(running, running), None);
        assert_eq!(forgets_memory(running, "memmap=512M$8G memmap=1G!4G"), None);
        let why = forgets_memory(running, "memmap=1G!4G").expect("a part is missing");
        assert!(why.contains("`memmap=512M$8G`"), "{why}");
        assert!(forgets_memory(running, "").is_some());
        assert_eq!(forgets_memory("quiet", ""), None);
    }

    #[test]
    fn words_without_which_live_update_is_off_are_named() {
        let running = "quiet kho=on liveupdate=on";
        assert_eq!(forgets_live_update(running, running), None);
        let why = forgets_live_update(running, "quiet kho=on").expect("one is missing");
        assert!(why.contains("`liveupdate=on`"), "{why}");
        assert!(forgets_live_update(running, "kho=off liveupdate=on").is_some());
        assert_eq!(forgets_live_update("quiet", ""), None);
    }

    #[test]
    fn what_no_kernel_reads_is_no_command_line() {
        assert_eq!(bad_command_line("quiet"), None);
        assert!(bad_command_line("a\nb").is_some());
        assert!(bad_command_line(&"x".repeat(2048)).is_some());
    }
}
