//! `stillpoint auth`: a small CA in a directory, for those who have none. All but `whoami` needs no daemon.

mod show;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::{Desk, format, say, say_json};
use crate::api::Known;
use crate::auth::Role;
use crate::auth::ca::{CA_LASTS, Ca, CaError, Entry, Is, Issued, Kind, Wanted, day, default_dir};
use crate::execute::unix_ns;
use crate::model::{Code, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The CA's directory [/etc/stillpoint/ca; others: ~/.config/stillpoint/ca].
    #[arg(long, global = true, value_name = "DIR", env = "STILLPOINT_CA_DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, clap::Subcommand)]
enum Act {
    /// Makes a CA: whoever has its key may do all on every host, so keep its directory where that is meant.
    Init {
        /// What it is called in certificates [Stillpoint CA, and some random letters].
        #[arg(long)]
        name: Option<String>,
        /// How long it lasts [10 years].
        #[arg(long, value_name = "TIME", value_parser = lifetime)]
        lifetime: Option<Duration>,
    },
    /// Issues a daemon's certificate, for `stillpointd --listen` and for etcd.
    Daemon {
        /// Whose it is: the host's name.
        name: String,
        /// A DNS name by which the daemon is called; may be given again.
        #[arg(long, value_name = "NAME")]
        dns: Vec<String>,
        /// An address by which it is called; may be given again.
        #[arg(long, value_name = "ADDRESS")]
        address: Vec<IpAddr>,
        /// How long it is good, as 90d, 12h or 30min.
        #[arg(long, value_name = "TIME", value_parser = lifetime, default_value = "365d")]
        lifetime: Duration,
    },
    /// Issues the certificate of somebody who calls daemons from other machines.
    Client {
        /// Whose it is: this name is in every audit log.
        name: String,
        /// What they may do.
        #[arg(long)]
        role: Role,
        /// How long it is good, as 90d, 12h or 30min.
        #[arg(long, value_name = "TIME", value_parser = lifetime, default_value = "90d")]
        lifetime: Duration,
    },
    /// Lists what was issued.
    Ls,
    /// Shows a certificate, of a name or any in a PEM file, and whether it still counts.
    Show(show::Args),
    /// Issues the certificate of a name anew, with a new key; the one before it stays good until its end.
    Renew {
        /// The name.
        name: String,
        /// How long it is good, as 90d, 12h or 30min.
        #[arg(long, value_name = "TIME", value_parser = lifetime, default_value = "90d")]
        lifetime: Duration,
    },
    /// Revokes all certificates of a name. Give daemons the new revoked.pem (`stillpointd --tls-revoked`).
    Revoke {
        /// The name.
        name: String,
    },
    /// Says who the daemon takes this caller for, and in which role.
    Whoami,
}

/// A time in days too.
fn lifetime(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no lifetime; write 90d, 12h, 30min or 60s");
    let lasts = match text.strip_suffix('d') {
        Some(days) => {
            let days: u64 = days.parse().map_err(|_| wrong())?;
            days.checked_mul(86_400)
                .map(Duration::from_secs)
                .ok_or_else(wrong)?
        }
        None => format::parse_time(text).map_err(|_| wrong())?,
    };
    // Certificates count in seconds, and dates end.
    let fits = Duration::from_secs(1)..Duration::from_secs(100 * 365 * 86_400);
    fits.contains(&lasts).then_some(lasts).ok_or_else(wrong)
}

impl From<CaError> for Problem {
    fn from(error: CaError) -> Self {
        let code = match error {
            CaError::Unknown(_) | CaError::None(_) => Code::NotFound,
            CaError::Exists(_) | CaError::Taken(_) => Code::NameTaken,
            CaError::Name(_) | CaError::TooLong(_) | CaError::NoName => Code::BadRequest,
            _ => Code::Failed,
        };
        Self::new(code, error.to_string())
    }
}

fn now() -> u64 {
    unix_ns() / 1_000_000_000
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let ca = Ca::at(args.dir.unwrap_or_else(default_dir));
    match args.act {
        Act::Init { name, lifetime } => {
            // Two CAs of one name can't be told apart by who reads a certificate.
            let name = name.unwrap_or_else(|| format!("Stillpoint CA {:08x}", fastrand::u32(..)));
            init(desk, &ca, &name, lifetime.unwrap_or(CA_LASTS))?;
        }
        Act::Daemon {
            name,
            dns,
            address,
            lifetime,
        } => {
            let wanted = Wanted {
                name,
                kind: Kind::Daemon,
                role: None,
                dns,
                addresses: address,
                lasts: lifetime,
            };
            issued(desk, &ca, &ca.issue(&wanted, now())?)?;
        }
        Act::Client {
            name,
            role,
            lifetime,
        } => {
            let wanted = Wanted {
                name,
                kind: Kind::Client,
                role: Some(role),
                dns: Vec::new(),
                addresses: Vec::new(),
                lasts: lifetime,
            };
            issued(desk, &ca, &ca.issue(&wanted, now())?)?;
        }
        Act::Renew { name, lifetime } => issued(desk, &ca, &ca.renew(&name, lifetime, now())?)?,
        Act::Ls => ls(desk, &ca)?,
        Act::Show(args) => show::run(desk, &ca, &args)?,
        Act::Revoke { name } => revoke(desk, &ca, &name)?,
        Act::Whoami => whoami(desk).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn init(desk: &Desk, ca: &Ca, name: &str, lasts: Duration) -> Result<(), Problem> {
    let made = ca.init(name, lasts)?;
    let (certificate, revoked) = (ca.certificate(), ca.revoked());
    if desk.json {
        let said = serde_json::json!({ "ca": certificate, "revoked": revoked, "until_unix_s": made.until_unix_s });
        return say_json(&said);
    }
    say(&format!(
        "made `{}`, which ends {}\n  {}   for daemons (--tls-ca) and clients (--remote-ca)\n  {}   for daemons \
         (--tls-revoked)",
        made.name,
        day(made.until_unix_s),
        certificate.display(),
        revoked.display()
    ))
}

fn issued(desk: &Desk, ca: &Ca, issued: &Issued) -> Result<(), Problem> {
    if desk.json {
        return say_json(issued);
    }
    let (certificate, key, trusted) = (
        issued.certificate.display(),
        issued.key.display(),
        issued.ca.display(),
    );
    let until = day(issued.entry.until_unix_s);
    let name = &issued.entry.name;
    say(&match issued.entry.kind {
        Kind::Daemon => format!(
            "issued to the daemon {name}, until {until}\n  stillpointd --listen ADDRESS:PORT --tls-cert {certificate} \
             --tls-key {key} --tls-ca {trusted} --tls-revoked {}",
            ca.revoked().display()
        ),
        Kind::Client => format!(
            "issued to {name}, role {}, until {until}\n  stillpoint --remote https://NAME:PORT --remote-cert \
             {certificate} --remote-key {key} --remote-ca {trusted} ...\n  or put them into ~/.config/stillpoint as \
             client.pem, client-key.pem and ca.pem",
            issued.entry.role.map_or("none", Role::word)
        ),
    })
}

fn revoke(desk: &Desk, ca: &Ca, name: &str) -> Result<(), Problem> {
    let revoked = ca.revoke(name, now())?;
    let list = ca.revoked();
    if desk.json {
        return say_json(&serde_json::json!({ "revoked": revoked, "list": list }));
    }
    say(&match revoked.len() {
        0 => format!("no certificate of `{name}` was good any more; nothing was changed"),
        many => format!(
            "revoked {many} of `{name}`; daemons refuse them as soon as they have {} (--tls-revoked)",
            list.display()
        ),
    })
}

/// What was issued, as it is shown.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    entry: Entry,
    state: Is,
}

fn ls(desk: &Desk, ca: &Ca) -> Result<(), Problem> {
    let all = ca.issued()?.into_iter().map(|entry| Shown {
        state: entry.is(now()),
        entry,
    });
    let all: Vec<_> = all.collect();
    if desk.json {
        return say_json(&all);
    }
    if all.is_empty() {
        return say("nothing was issued yet");
    }
    let rows: Vec<_> = all.iter().map(row).collect();
    let head = ["NAME", "FOR", "STATE", "UNTIL", "SERIAL"];
    say(&format::table(&head, &[], &rows))
}

fn row(shown: &Shown) -> Vec<String> {
    let entry = &shown.entry;
    let what = match entry.kind {
        Kind::Daemon => format!("daemon at {}", entry.names.join(", ")),
        Kind::Client => format!("role {}", entry.role.map_or("none", Role::word)),
    };
    vec![
        entry.name.clone(),
        what,
        shown.state.word().into(),
        day(entry.until_unix_s),
        entry.serial.clone(),
    ]
}

async fn whoami(desk: &Desk) -> Result<(), Problem> {
    let known: Known = desk.api.get("/v1/whoami").await?;
    if desk.json {
        return say_json(&known);
    }
    let role = known.role.map_or("none", Role::word);
    say(&format!("{}, role {role}, from {}", known.who, known.from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_have_days_and_an_end() {
        assert_eq!(lifetime("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(lifetime("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(lifetime("12h"), Ok(Duration::from_secs(12 * 3600)));
        for bad in [
            "",
            "0d",
            "d",
            "-1d",
            "1ms",
            "90",
            "99999999999999999999d",
            "40000d",
        ] {
            lifetime(bad).expect_err(bad);
        }
    }
}
