//! What a VMM and those who steer it say to each other.
//!
//! | module | what it holds |
//! |---|---|
//! | [`spec`] | [`spec::MachineSpec`]: what a machine is, as its owner wrote it; validated once |
//! | [`clock`] | what a pause is to the guest's clocks |
//! | [`message`] | requests and replies on the control socket |
//! | [`frame`] | one message and its file descriptors as one packet |
//! | [`client`] | a blocking client of the control socket |
//! | [`ownership`] | the word that says which process may run the guest |
//! | [`report`] | what every swap leaves behind |
//! | [`recovery`] | how soon a guest was as fast again as before |
//! | [`rehearsal`] | what a rehearsal showed |
//! | [`health`] | signs of life |
//! | [`secret`] | how a VMM proves that it is the one that was started |
//!
//! This crate must stay readable across releases of both sides: fields are only added, each with
//! a default that means "as before". It opens no `/dev/kvm` and knows nothing of saved state.
//! The control socket never carries *offer* or *adopt*: those go only over the socketpair that
//! the daemon made.

pub mod client;
pub mod clock;
pub mod frame;
pub mod health;
pub mod message;
pub mod nanos;
pub mod ownership;
pub mod recovery;
pub mod rehearsal;
pub mod report;
pub mod secret;
pub mod spec;
