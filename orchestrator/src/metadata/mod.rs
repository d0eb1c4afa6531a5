//! What a guest sees at `http://169.254.169.254`: what is going to happen to it, what happened, and
//! what it is.
//!
//! ```text
//!  guest ──request──▶ serve (limits) ▶ asked (judged) ▶ answer ◀── board ──▶ store
//!                                                                  ▲
//!  swap ──announce, start, end── notices ─────────────────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`board`] | pure: which pauses are announced to whom, who listens, who approved |
//! | [`notices`] | the board with its store |
//! | [`asked`] | a guest's request, judged |
//! | [`answer`], [`document`], [`instance`] | what is answered, byte for byte |
//! | [`described`] | what of it is ours, as OpenAPI |
//! | [`serve`], [`rate`] | HTTP for one guest, and what it may cost |
//! | [`ways`] | the wires on which guests reach it |
//!
//! A guest is known by the wire on which it asks, never by anything it says. Must never: tell a
//! guest of another group's events, let it act for another, or hold more memory for a guest than
//! the limits say.

pub mod answer;
pub mod asked;
pub mod board;
pub mod described;
pub mod document;
pub mod instance;
pub mod notices;
pub mod rate;
pub mod serve;
pub mod ways;
