//! `stillpoint auth show`: what a certificate says, and whether it still counts.
//!
//! A certificate does not say itself whether it was revoked. Who issued it knows, and has it in the register; others
//! have the list that the CA made of them. Where neither is at hand that is said, and nothing is guessed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::now;
use crate::auth::Role;
use crate::auth::ca::{Ca, CaError, Is, day};
use crate::auth::certificate::{Certificate, issuer, revoked, serials};
use crate::cli::{Desk, say, say_json};
use crate::model::{Code, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The name, or the file.
    which: String,
    /// The CA's list of revoked certificates, where its directory is not at hand.
    #[arg(long, value_name = "FILE")]
    revoked: Option<PathBuf>,
}

/// Whether a certificate counts.
#[derive(Debug, Serialize)]
struct Standing {
    /// What it is; absent where nobody here knows whether it was revoked.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<Is>,
    /// When it was revoked, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked_at_unix_s: Option<u64>,
    /// By what that is known, or why it isn't.
    by: String,
}

pub(super) fn run(desk: &Desk, ca: &Ca, args: &Args) -> Result<(), Problem> {
    let path = file(ca, &args.which)?;
    let read = Certificate::of_file(&path);
    let read = read.map_err(|e| Problem::new(Code::BadRequest, e.to_string()))?;
    let is_over = now() > read.until_unix_s;
    let standing = match &args.revoked {
        Some(list) => by_list(&read, list)?,
        None => by_register(&read, ca)?,
    };
    if desk.json {
        let said = serde_json::json!({
            "file": path, "certificate": read, "expired": is_over, "standing": standing
        });
        return say_json(&said);
    }
    say(&text(&read, &standing, is_over))
}

fn file(ca: &Ca, which: &str) -> Result<PathBuf, Problem> {
    let (issued, _) = ca.of_name(which);
    let path = match !which.contains('/') && issued.exists() {
        true => issued,
        false => PathBuf::from(which),
    };
    match path.exists() {
        true => Ok(path),
        false => {
            let message = format!(
                "`{which}` is neither a name that something was issued to (`stillpoint auth ls`) nor a file"
            );
            Err(Problem::new(Code::NotFound, message))
        }
    }
}

fn by_register(read: &Certificate, ca: &Ca) -> Result<Standing, Problem> {
    let unknown = |by: String| Standing {
        state: None,
        revoked_at_unix_s: None,
        by,
    };
    let issued = match ca.issued() {
        Ok(issued) => issued,
        Err(CaError::None(dir)) => {
            let dir = dir.display();
            return Ok(unknown(format!(
                "no CA in {dir}; `--revoked FILE` looks into the CA's list"
            )));
        }
        Err(error) => return Err(error.into()),
    };
    let entry = issued.iter().find(|entry| entry.serial == read.serial);
    Ok(match entry {
        Some(entry) => Standing {
            state: Some(entry.is(now())),
            revoked_at_unix_s: entry.revoked_at_unix_s,
            by: "the CA's register".into(),
        },
        None if read.is_ca => {
            unknown("a CA is not revoked: whom to trust is a file of its own".into())
        }
        None => {
            unknown("this CA has not issued it; `--revoked FILE` looks into another's list".into())
        }
    })
}

fn by_list(read: &Certificate, path: &Path) -> Result<Standing, Problem> {
    let bad = |error: &dyn std::fmt::Display| Problem::new(Code::BadRequest, error.to_string());
    let mut is_revoked = false;
    for list in revoked(path).map_err(|e| bad(&e))? {
        let of = issuer(&list).map_err(|e| bad(&e))?;
        if of != read.issuer {
            return Err(bad(&format!(
                "{} is the list of `{of}`, and the certificate is of `{}`: it says nothing of it",
                path.display(),
                read.issuer
            )));
        }
        let serials = serials(&list).map_err(|e| bad(&e))?;
        is_revoked |= serials.contains(&read.serial);
    }
    let is_over = now() > read.until_unix_s;
    Ok(Standing {
        state: Some(match (is_revoked, is_over) {
            (true, _) => Is::Revoked,
            (false, true) => Is::Expired,
            (false, false) => Is::Good,
        }),
        revoked_at_unix_s: None,
        by: format!("the list {}", path.display()),
    })
}

fn text(read: &Certificate, standing: &Standing, is_over: bool) -> String {
    let by = &standing.by;
    let state = match (standing.state, standing.revoked_at_unix_s) {
        (Some(Is::Revoked), Some(at)) => format!("revoked on {}, by {by}", day(at)),
        (Some(state), _) => format!("{}, by {by}", state.word()),
        (None, _) if is_over => "expired".into(),
        (None, _) => format!("not known whether it was revoked: {by}"),
    };
    let names = match read.names.is_empty() {
        true => "none".into(),
        false => read.names.join(", "),
    };
    let role = match (read.is_ca, read.role) {
        (true, _) => "none: it is a CA",
        (false, role) => role.map_or("none", Role::word),
    };
    format!(
        "name     {}\nrole     {role}\nnames    {names}\nissuer   {}\nserial   {}\nfrom     {}\nuntil    {}\nstate    {state}",
        read.name,
        read.issuer,
        read.serial,
        day(read.from_unix_s),
        day(read.until_unix_s)
    )
}
