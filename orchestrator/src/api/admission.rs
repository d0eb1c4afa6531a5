//! What a fleet has to say of a guest that is to be started here, or is no more.

use super::Desk;
use super::refusal::Refusal;
use crate::fleet::seats::Wish;
use crate::model::{Code, Problem, VmRecord};

impl Desk {
    /// Gives a VM its seat in its availability set; one that it had in another is free again.
    pub(super) async fn seat(
        &self,
        vm: &mut VmRecord,
        known: Option<&VmRecord>,
        wish: Wish,
    ) -> Result<(), Refusal> {
        let set = vm.profile.availability_set.clone();
        if let Some(set) = &set {
            let seat = self.fleet.seat(set, &vm.name, wish).await?;
            vm.profile.update_domain = seat.number().into();
        }
        let left = known.and_then(|known| known.profile.availability_set.as_ref());
        if let Some(left) = left.filter(|&left| Some(left) != set.as_ref()) {
            self.fleet.unseat(left, &vm.name).await?;
        }
        Ok(())
    }

    /// Gives the seat of a VM back that is gone.
    pub(super) async fn unseat(&self, vm: &VmRecord) {
        let Some(set) = &vm.profile.availability_set else {
            return;
        };
        // It is gone; its seat may stay taken where the fleet can't be told.
        if let Err(problem) = self.fleet.unseat(set, &vm.name).await {
            tracing::warn!(vm = %vm.name, "its seat in set {set} is not given back: {problem}");
        }
    }

    /// A host that is to be left alone takes no new guests. A fleet that can't be asked is no reason to
    /// leave a guest off.
    pub(super) async fn not_cordoned(&self) -> Result<(), Refusal> {
        match self.fleet.cordoned().await {
            Ok(Some(cordon)) => {
                let me = &self.fleet.me;
                let message = format!(
                    "host {me} is cordoned ({}), so no guest is started there; \
                     `stillpoint host uncordon {me}` ends that",
                    cordon.reason
                );
                Err(Problem::new(Code::Cordoned, message).into())
            }
            Ok(None) => Ok(()),
            Err(error) => {
                tracing::warn!("not known whether this host is cordoned: {error}");
                Ok(())
            }
        }
    }
}
