//! KVM's modules, exchanged under guests that have let go of them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A module of the kernel, as it is loaded or to be loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Module {
    /// Its name, such as `kvm_amd`.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Its parameters that are told, `name=value`.
    pub parameters: Vec<String>,
}

/// What is exchanged of KVM, and what was there before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KvmSwap {
    /// What is loaded, in this order. Empty: the operator's command does all of it.
    pub to: Vec<Module>,
    /// What was there: the way back, in the order in which it is loaded.
    pub before: Vec<Module>,
}

/// Whether KVM's modules could be exchanged now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KvmCheck {
    /// What would be loaded in place of what; absent where that can't be told.
    pub swap: Option<KvmSwap>,
    /// The guests that would stand still.
    pub vms: Vec<String>,
    /// What stands in the way; nothing if it would work.
    pub problems: Vec<String>,
}
