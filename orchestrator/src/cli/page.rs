//! `stillpoint page`

use std::process::ExitCode;

use super::{Desk, say, say_json};
use crate::api::Known;
use crate::model::{Code, Problem};
use crate::web::door;

/// Read past the daemon: who may read the file may have the key.
pub(super) async fn run(desk: &Desk) -> Result<ExitCode, Problem> {
    if let Some(remote) = desk.api.remote() {
        // A browser shows its user's certificate, and needs no key.
        let url = remote.url();
        match desk.json {
            true => say_json(&serde_json::json!({ "url": url }))?,
            false => say(&format!("{url} (in a browser that has this certificate)"))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    // A daemon that is just starting has written it when it answers. One that doesn't is told of below.
    let _: Result<Known, Problem> = desk.api.get("/v1/whoami").await;
    let path = door::path(&desk.run_dir);
    let url = std::fs::read_to_string(&path).map_err(|error| {
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => "the daemon serves no page; start it with \
                                              `stillpointd --web 127.0.0.1:8080`"
                .to_owned(),
            _ => format!("cannot read {}: {error}", path.display()),
        };
        Problem::new(Code::NotFound, message)
    })?;
    let url = url.trim();
    if desk.json {
        say_json(&serde_json::json!({ "url": url }))?;
    } else {
        say(url)?;
    }
    Ok(ExitCode::SUCCESS)
}
