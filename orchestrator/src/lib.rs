//! Starts guests on this host, watches them, and swaps what runs them.
//!
//! ```text
//!   cli ──HTTP──▶ api ──▶ reconcile ──▶ execute ──▶ agent ──control socket──▶ stillpoint-vmm
//!                  │          │  ▲
//!                  ▼          ▼  └── plan (pure)
//!                store ◀── model (nouns)
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`model`] | nouns: VMs, swaps, releases, events, problems. No I/O, no clock |
//! | [`plan`] | pure: what is wanted and what is seen, to the next steps and their reasons |
//! | [`store`] | SQLite: desired and observed state, releases, every swap's report |
//! | [`agent`] | VMM processes: start, find, watch, pair, end |
//! | [`execute`] | carries out one step |
//! | [`fleet`] | many hosts, one plan: what daemons tell each other, and who drives rollouts |
//! | [`orders`] | carries out what a rollout asks of this host |
//! | [`metadata`] | what guests see at 169.254.169.254: events, and the VM itself |
//! | [`metrics`] | figures for a monitoring system, added up from the records |
//! | [`reconcile`] | per VM: look, plan, execute, record |
//! | [`traces`] | spans of swaps and rollouts, for a collector of OpenTelemetry |
//! | [`simulate`] | rollouts over a fleet that isn't there, by the same planner |
//! | [`api`] | HTTP over a Unix socket, with its OpenAPI |
//! | [`auth`] | who calls, in which role: uids, certificates, and a small CA |
//! | [`web`] | pages for a browser, to be looked at |
//! | [`daemon`] | puts these together: directories, lock, start, end |
//! | [`logs`] | where the daemon's log goes: journald with its fields, or standard error |
//! | [`doctor`] | what this host can and can't do |
//! | [`cli`] | the `stillpoint` command, one file per verb |
//!
//! It never opens `/dev/kvm` and never reads saved state. Killing the daemon at any moment harms
//! no guest: nothing here is needed for a guest to run.

pub mod agent;
pub mod api;
pub mod auth;
pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod execute;
pub mod fleet;
mod http;
pub mod logs;
pub mod metadata;
pub mod metrics;
pub mod model;
pub mod orders;
pub mod plan;
pub mod reconcile;
pub mod simulate;
pub mod store;
pub mod traces;
pub mod web;
