//! Errors as responses.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use crate::model::{Code, Problem};
use crate::store::StoreError;

/// A problem as a response.
#[derive(Debug)]
pub struct Refusal(pub Problem);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self(error.into())
    }
}

impl From<crate::store::shared::SharedError> for Refusal {
    fn from(error: crate::store::shared::SharedError) -> Self {
        Self(error.into())
    }
}

impl From<stillpoint_control::spec::SpecError> for Refusal {
    fn from(error: stillpoint_control::spec::SpecError) -> Self {
        Self(Problem::new(Code::BadRequest, error.to_string()))
    }
}

/// A JSON body whose errors are problems like all others.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(Refusal(Problem::new(
                Code::BadRequest,
                format!("request body: {}", innermost(&rejection)),
            ))),
        }
    }
}

/// The reader's own words, which name the field.
fn innermost(rejection: &JsonRejection) -> String {
    let mut error: &dyn std::error::Error = rejection;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

pub(super) async fn no_such_path(uri: Uri) -> Refusal {
    let message = format!("there is nothing at {uri}; GET /openapi.json lists all paths");
    Refusal(Problem::new(Code::NotFound, message))
}

pub(super) async fn no_such_method(method: Method, uri: Uri) -> Response {
    let message = format!("{uri} has no {method}; GET /openapi.json lists all methods");
    let problem = Problem::new(Code::BadRequest, message);
    (StatusCode::METHOD_NOT_ALLOWED, Json(problem)).into_response()
}
