//! `/v1/pauses`: what guests are told of their pauses, and an operator's word on it.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use crate::metadata::board::{Board, EventError};
use crate::model::{Approver, Code, EventId, Pause, Problem};

/// Why a pause is withdrawn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// For the record, and for the guest's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl From<EventError> for Refusal {
    fn from(error: EventError) -> Self {
        let code = match error {
            EventError::Unknown(_) => Code::NotFound,
            EventError::Late(..) => Code::TooLate,
        };
        Problem::new(code, error.to_string()).into()
    }
}

/// All pauses: those to come, and the last of those past, oldest first.
#[utoipa::path(get, path = "/v1/pauses", responses((status = 200, body = [Pause])))]
pub(super) async fn list(State(desk): State<Desk>) -> Json<Vec<Pause>> {
    let all = |board: &Board| board.all().into_iter().cloned().collect();
    Json(desk.host.notices.read(all).await)
}

/// Approves an event in its group's place. The pause starts when all of its groups have approved.
#[utoipa::path(
    post, path = "/v1/pauses/{event}/approve", params(("event" = String, Path,)),
    responses((status = 200, body = Pause), (status = "4XX", body = Problem))
)]
pub(super) async fn approve(
    State(desk): State<Desk>,
    Path(event): Path<String>,
) -> Result<Json<Pause>, Refusal> {
    let event = EventId(event);
    desk.approve(&event).await?;
    desk.pause(&event).await
}

/// Withdraws the pause of which this event tells, unless it has started. The swap it is for is not
/// done.
#[utoipa::path(
    post, path = "/v1/pauses/{event}/cancel", params(("event" = String, Path,)),
    request_body = Cancel,
    responses((status = 200, body = Pause), (status = "4XX", body = Problem))
)]
pub(super) async fn cancel(
    State(desk): State<Desk>,
    Path(event): Path<String>,
    Body(Cancel { reason }): Body<Cancel>,
) -> Result<Json<Pause>, Refusal> {
    let event = EventId(event);
    desk.cancel(&event, reason).await?;
    desk.pause(&event).await
}

impl Desk {
    /// Approves an event in its group's place.
    pub(crate) async fn approve(&self, event: &EventId) -> Result<(), Refusal> {
        let approve = |board: &mut Board, now| {
            let group = board.group_of(event).cloned();
            let group = group.ok_or_else(|| EventError::Unknown(event.to_string()))?;
            board.approve(
                std::slice::from_ref(event),
                &group,
                &Approver::Operator,
                now,
            )
        };
        Ok(self.host.notices.change(approve).await??)
    }

    /// Withdraws the pause of which this event tells.
    pub(crate) async fn cancel(
        &self,
        event: &EventId,
        reason: Option<String>,
    ) -> Result<(), Refusal> {
        let why = match reason {
            Some(reason) => format!("cancelled by an operator: {reason}"),
            None => "cancelled by an operator".into(),
        };
        let cancel = |board: &mut Board, now| board.cancel(event, &why, now);
        self.host.notices.change(cancel).await??;
        Ok(())
    }

    async fn pause(&self, event: &EventId) -> Result<Json<Pause>, Refusal> {
        let tells = |pause: &&Pause| pause.notices.iter().any(|n| n.event == *event);
        let find = |board: &Board| board.all().into_iter().find(tells).cloned();
        let found = self.host.notices.read(find).await;
        found
            .map(Json)
            .ok_or_else(|| EventError::Unknown(event.to_string()).into())
    }
}
