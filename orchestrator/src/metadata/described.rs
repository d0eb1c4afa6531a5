//! What of the service is ours, described as OpenAPI for whoever writes a guest's side of it. The rest is
//! Azure's, which describes it in prose.

use utoipa::OpenApi;

use super::answer::Pauses;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Stillpoint's metadata service",
        description = "What is ours of the service that a guest finds at http://169.254.169.254, and by vsock \
                       at port 80 of its host. Every request needs the header `Metadata: true`."
    ),
    paths(pauses, wait)
)]
struct Document;

/// Every pause of this guest, past and to come, with what was measured of it.
#[utoipa::path(
    get, path = "/stillpoint/v1/pauses",
    params(("Metadata" = String, Header, description = "`true`")),
    responses((status = 200, body = Pauses), (status = 400), (status = 429))
)]
#[expect(dead_code, reason = "a name for its description")]
fn pauses() {}

/// The events, as soon as the `DocumentIncarnation` is another than `last_etag`. It is the same document
/// as without `wait_for_change`.
#[utoipa::path(
    get, path = "/metadata/scheduledevents",
    params(
        ("Metadata" = String, Header, description = "`true`"),
        ("api-version" = String, Query, description = "2017-03-01 to 2020-07-01"),
        ("wait_for_change" = bool, Query, description = "`true`"),
        ("last_etag" = Option<u64>, Query, description = "what the guest has; 0 when absent"),
        ("timeout_sec" = Option<u64>, Query, description = "how long to wait; 60 when absent, 300 at most"),
    ),
    responses((status = 200, content_type = "application/json"), (status = 400), (status = 429))
)]
#[expect(dead_code, reason = "a name for its description")]
fn wait() {}

/// The OpenAPI document, as it is committed.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(&Document::openapi())?;
    text.push('\n');
    Ok(text)
}
