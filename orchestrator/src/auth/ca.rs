//! A small CA in a directory, for those who have none: a key, what it issued, and what it revoked.
//!
//! ```text
//! DIR (0700)
//!   ca.pem          whom daemons and clients trust       ca-key.pem    the CA's key: whoever has it is an admin everywhere
//!   revoked.pem     the list of revoked certificates     register.json what was issued, and what became of it
//!   issued/NAME.pem, issued/NAME-key.pem                 the newest of each name
//! ```
//!
//! Every file is replaced as a whole. What is issued is in the register before its certificate is anywhere: a
//! certificate that nobody knows of can't be revoked. Must never: write a key that others can read.

mod error;
mod register;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use time::OffsetDateTime;

use super::Role;
use super::certificate::{Certificate, hex, role_uri};

pub use error::CaError;
pub use register::{Entry, Is, Kind};
use register::{Locked, Register, write};

/// Clocks of two hosts may differ by so much and a new certificate counts on both.
const BACKDATED: Duration = Duration::from_secs(300);
/// A CA lasts so long.
pub const CA_LASTS: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What is to be issued.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// To whom.
    pub name: String,
    /// What for.
    pub kind: Kind,
    /// A client's role.
    pub role: Option<Role>,
    /// A daemon's DNS names.
    pub dns: Vec<String>,
    /// A daemon's addresses.
    pub addresses: Vec<IpAddr>,
    /// For how long.
    pub lasts: Duration,
}

/// What was issued, and where it lies.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Issued {
    /// As it is registered.
    #[serde(flatten)]
    pub entry: Entry,
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Whom to trust.
    pub ca: PathBuf,
}

/// A CA in a directory.
#[derive(Clone, Debug)]
pub struct Ca {
    dir: PathBuf,
}

impl Ca {
    /// That in a directory.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Its list of revoked certificates.
    pub fn revoked(&self) -> PathBuf {
        self.dir.join("revoked.pem")
    }

    fn key(&self) -> PathBuf {
        self.dir.join("ca-key.pem")
    }

    /// Where the newest certificate and key of a name lie.
    pub fn of_name(&self, name: &str) -> (PathBuf, PathBuf) {
        let issued = self.dir.join("issued");
        (
            issued.join(format!("{name}.pem")),
            issued.join(format!("{name}-key.pem")),
        )
    }

    /// Makes a new one.
    pub fn init(&self, name: &str, lasts: Duration) -> Result<Certificate, CaError> {
        register::make_dir(&self.dir)?;
        let locked = Locked::take(&self.dir)?;
        if self.key().exists() || self.certificate().exists() {
            return Err(CaError::Exists(self.dir.clone()));
        }
        register::make_dir(&self.dir.join("issued"))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = called(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = span(lasts);
        params.serial_number = Some(serial()?);
        let made = params.self_signed(&key)?;
        let issuer = Issuer::from_params(&params, &key);
        locked.save(&Register::default())?;
        write(
            &self.revoked(),
            list(&Register::default(), &issuer)?.as_bytes(),
            false,
        )?;
        write(&self.key(), key.serialize_pem().as_bytes(), true)?;
        // Last: with it there is a CA.
        write(&self.certificate(), made.pem().as_bytes(), false)?;
        Ok(Certificate::of_der(made.der())?)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, CaError> {
        if !self.certificate().exists() {
            return Err(CaError::None(self.dir.clone()));
        }
        let read = |path: PathBuf| {
            std::fs::read_to_string(&path).map_err(|source| CaError::Io {
                what: "read",
                path,
                source,
            })
        };
        let key = KeyPair::from_pem(&read(self.key())?)?;
        Ok(Issuer::from_ca_cert_pem(&read(self.certificate())?, key)?)
    }

    /// Issues a certificate to who has none that is good.
    pub fn issue(&self, wanted: &Wanted, now_unix_s: u64) -> Result<Issued, CaError> {
        let issuer = self.issuer()?;
        let locked = Locked::take(&self.dir)?;
        let register = locked.load()?;
        if register.good(&wanted.name, now_unix_s).is_some() {
            return Err(CaError::Taken(wanted.name.clone()));
        }
        self.make(&locked, register, &issuer, wanted, now_unix_s)
    }

    /// Issues the last certificate of a name anew, with a new key. The one before it stays good until its end.
    pub fn renew(&self, name: &str, lasts: Duration, now_unix_s: u64) -> Result<Issued, CaError> {
        let issuer = self.issuer()?;
        let locked = Locked::take(&self.dir)?;
        let register = locked.load()?;
        let last = register
            .last(name)
            .ok_or_else(|| CaError::Unknown(name.into()))?;
        let (addresses, dns): (Vec<_>, Vec<_>) = last
            .names
            .iter()
            .partition(|name| name.parse::<IpAddr>().is_ok());
        let wanted = Wanted {
            name: name.into(),
            kind: last.kind,
            role: last.role,
            dns: dns.into_iter().cloned().collect(),
            addresses: addresses
                .into_iter()
                .filter_map(|one| one.parse().ok())
                .collect(),
            lasts,
        };
        self.make(&locked, register, &issuer, &wanted, now_unix_s)
    }

    fn make(
        &self,
        locked: &Locked,
        mut register: Register,
        issuer: &Issuer<'static, KeyPair>,
        wanted: &Wanted,
        now_unix_s: u64,
    ) -> Result<Issued, CaError> {
        check_name(&wanted.name)?;
        let names = wanted.dns.len() + wanted.addresses.len();
        if wanted.kind == Kind::Daemon && names == 0 {
            return Err(CaError::NoName);
        }
        let ca = Certificate::of_file(&self.certificate())?;
        let until = now_unix_s.saturating_add(wanted.lasts.as_secs());
        if until > ca.until_unix_s {
            return Err(CaError::TooLong(day(ca.until_unix_s)));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = called(&wanted.name);
        params.subject_alt_names = alternatives(wanted)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A daemon is a client of etcd's with the same certificate; of other daemons it is one without a role.
        params.extended_key_usages = match wanted.kind {
            Kind::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Kind::Daemon => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        };
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = span(wanted.lasts);
        let number = serial()?;
        params.serial_number = Some(number.clone());
        let made = params.signed_by(&key, issuer)?;
        let read = Certificate::of_der(made.der())?;
        let entry = Entry {
            name: read.name,
            kind: wanted.kind,
            role: read.role,
            names: read.names,
            serial: hex(&number.to_bytes()),
            from_unix_s: read.from_unix_s,
            until_unix_s: read.until_unix_s,
            revoked_at_unix_s: None,
        };
        register.issued.push(entry.clone());
        locked.save(&register)?;
        let (certificate, key_file) = self.of_name(&wanted.name);
        write(&key_file, key.serialize_pem().as_bytes(), true)?;
        write(&certificate, made.pem().as_bytes(), false)?;
        Ok(Issued {
            entry,
            certificate,
            key: key_file,
            ca: self.certificate(),
        })
    }

    /// Revokes all certificates of a name that are good; how many there were.
    pub fn revoke(&self, name: &str, now_unix_s: u64) -> Result<Vec<Entry>, CaError> {
        let issuer = self.issuer()?;
        let locked = Locked::take(&self.dir)?;
        let mut register = locked.load()?;
        if register.last(name).is_none() {
            return Err(CaError::Unknown(name.into()));
        }
        let mut revoked = Vec::new();
        for entry in &mut register.issued {
            if entry.name == name && entry.is(now_unix_s) == Is::Good {
                entry.revoked_at_unix_s = Some(now_unix_s);
                revoked.push(entry.clone());
            }
        }
        register.lists += 1;
        let list = list(&register, &issuer)?;
        locked.save(&register)?;
        write(&self.revoked(), list.as_bytes(), false)?;
        Ok(revoked)
    }

    /// All that was issued, oldest first.
    pub fn issued(&self) -> Result<Vec<Entry>, CaError> {
        if !self.certificate().exists() {
            return Err(CaError::None(self.dir.clone()));
        }
        Ok(Locked::take(&self.dir)?.load()?.issued)
    }
}

/// Names are names of files, too.
fn check_name(name: &str) -> Result<(), CaError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = name
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    match first && name.len() <= 64 && name.chars().all(plain) && !name.ends_with("-key") {
        true => Ok(()),
        false => Err(CaError::Name(name.into())),
    }
}

fn alternatives(wanted: &Wanted) -> Result<Vec<SanType>, CaError> {
    let mut all = Vec::new();
    for name in &wanted.dns {
        all.push(SanType::DnsName(Ia5String::try_from(name.as_str())?));
    }
    all.extend(
        wanted
            .addresses
            .iter()
            .map(|address| SanType::IpAddress(*address)),
    );
    if let Some(role) = wanted.role {
        all.push(SanType::URI(Ia5String::try_from(role_uri(role))?));
    }
    Ok(all)
}

fn called(name: &str) -> DistinguishedName {
    let mut called = DistinguishedName::new();
    called.push(DnType::CommonName, name);
    called
}

fn span(lasts: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - BACKDATED, now + lasts)
}

/// 127 random bits; positive, as a serial number has to be.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|e| {
        CaError::Io {
            what: "read",
            path: "/dev/urandom".into(),
            source: e.into(),
        }
    })?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn list(
    register: &Register,
    issuer: &Issuer<'_, impl rcgen::SigningKey>,
) -> Result<String, CaError> {
    let at = |unix_s: u64| {
        let seconds = i64::try_from(unix_s).unwrap_or(i64::MAX);
        OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    };
    let revoked = register.issued.iter().filter_map(|entry| {
        Some(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&register::bytes(&entry.serial)?),
            revocation_time: at(entry.revoked_at_unix_s?),
            reason_code: None,
            invalidity_date: None,
        })
    });
    let (this_update, next_update) = span(CA_LASTS);
    let params = CertificateRevocationListParams {
        this_update,
        next_update,
        crl_number: SerialNumber::from(register.lists),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(params.signed_by(issuer)?.pem()?)
}

/// A day, as people write it.
pub fn day(unix_s: u64) -> String {
    let seconds = i64::try_from(unix_s).unwrap_or(i64::MAX);
    let at = jiff::Timestamp::from_second(seconds);
    at.map_or_else(
        |_| "never".into(),
        |at| at.strftime("%Y-%m-%d %H:%M UTC").to_string(),
    )
}

/// Where the CA is when nobody says.
pub fn default_dir() -> PathBuf {
    config_dir().join("ca")
}

/// Where this user's configuration is.
pub fn config_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return Path::new("/etc/stillpoint").into();
    }
    match std::env::var_os("XDG_CONFIG_HOME") {
        Some(dir) if !dir.is_empty() => Path::new(&dir).join("stillpoint"),
        _ => std::env::home_dir()
            .unwrap_or_else(|| "/".into())
            .join(".config/stillpoint"),
    }
}

#[cfg(test)]
mod tests;
