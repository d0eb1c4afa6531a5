//! What to do next, from what is wanted and what is seen. Pure: no I/O, no clock.
//!
//! Two rooms, for two questions that are asked by different callers at different scales:
//!
//! | room | the question | who asks |
//! |---|---|---|
//! | [`vm`] | what is next for one VM on its host, and who runs a guest after a swap nobody watched | [`crate::reconcile`] |
//! | [`rollout`] | which VMs and hosts of a fleet are next, why these, and why not each of the others | [`crate::fleet`], [`crate::simulate`] |

pub mod health;
pub mod lanes;
pub mod rollout;
pub mod vm;
