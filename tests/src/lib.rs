//! The harness: real VMMs, a real guest, and questions to both.
//!
//! | module | what it holds |
//! |---|---|
//! | [`releases`] | the binaries under test, by name |
//! | [`vm`] | a VMM process with its guest, and its swap, driven as the daemon does |
//! | [`guest`] | what pulse writes down, read from the RAM file |
//! | [`ground`] | what this machine can do, and skipping by name what it can't |

pub mod ground;
pub mod guest;
pub mod releases;
pub mod vm;
