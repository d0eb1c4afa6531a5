//! Which Debian mirror this machine uses: read from apt's own configuration, never assumed.
//!
//! Both of apt's formats are read, one-line `.list` and deb822 `.sources` (sources.list(5)). Of all
//! entries only those count that name a suite of Debian itself with its component `main`: third
//! parties publish for `bookworm` too, under other components. What comes out is the root of the
//! archive and, if there is an entry for it, that of the security archive. Nothing is fetched here.

use std::path::{Path, PathBuf};

/// Roots of the Debian archive, as this machine's apt is told to reach them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// What has `dists/bookworm`, `dists/trixie-backports` and so on below it.
    pub archive: String,
    /// The same for `dists/bookworm-security`; a machine may have none.
    pub security: Option<String>,
}

/// Why no mirror was found.
#[derive(Debug, thiserror::Error)]
pub enum NoMirror {
    /// The folder of apt's configuration can't be read.
    #[error("reading apt's sources at {}: {error}; is this a Debian machine?", path.display())]
    Unreadable {
        /// What was read.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// There are sources, none of them Debian's.
    #[error(
        "no apt source below {} is a Debian archive (a suite such as bookworm, with main); \
         name a mirror by STILLPOINT_MIRROR=URI[,SECURITY-URI]", .0.display()
    )]
    NoneDebian(PathBuf),
}

/// One source of binary packages.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    uri: String,
    suite: String,
    components: Vec<String>,
}

const CODENAMES: &[&str] = &[
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "stable",
    "oldstable",
    "testing",
    "unstable",
];
const POCKETS: &[&str] = &["updates", "backports", "security", "proposed-updates"];

impl Mirror {
    /// The mirror that `STILLPOINT_MIRROR` names, or else that of the configuration below `etc`
    /// (`/etc/apt`).
    pub fn of_this_machine(etc: &Path) -> Result<Self, NoMirror> {
        match std::env::var("STILLPOINT_MIRROR") {
            Ok(named) if !named.is_empty() => Ok(Self::named(&named)),
            _ => Self::configured(etc),
        }
    }

    fn named(uris: &str) -> Self {
        let (archive, security) = uris
            .split_once(',')
            .map_or((uris, None), |(a, s)| (a, Some(s)));
        Self {
            archive: archive.into(),
            security: security.map(Into::into),
        }
    }

    fn configured(etc: &Path) -> Result<Self, NoMirror> {
        let mut entries = Vec::new();
        for path in source_files(etc)? {
            let unreadable = |error| NoMirror::Unreadable {
                path: path.clone(),
                error,
            };
            let text = std::fs::read_to_string(&path).map_err(unreadable)?;
            entries.extend(match path.extension().is_some_and(|e| e == "sources") {
                true => deb822(&text),
                false => one_line(&text),
            });
        }
        choose(&entries).ok_or_else(|| NoMirror::NoneDebian(etc.to_owned()))
    }
}

/// `sources.list`, and what is in `sources.list.d`, in apt's order: by name.
fn source_files(etc: &Path) -> Result<Vec<PathBuf>, NoMirror> {
    let parts = etc.join("sources.list.d");
    let mut files: Vec<PathBuf> = match std::fs::read_dir(&parts) {
        Ok(dir) => dir.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(NoMirror::Unreadable { path: parts, error }),
    };
    files.retain(|path| {
        path.extension()
            .is_some_and(|e| e == "list" || e == "sources")
    });
    files.sort();
    let main = etc.join("sources.list");
    if main.is_file() {
        files.insert(0, main);
    }
    Ok(files)
}

/// `deb [options] uri suite component...`
fn one_line(text: &str) -> Vec<Entry> {
    let parse = |line: &str| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?;
        let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        Some(Entry {
            uri: words.next()?,
            suite: words.next()?,
            components: words.collect(),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// Stanzas of `Field: value`, values going on in indented lines.
fn deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            entries.extend(entries_of(&std::mem::take(&mut stanza)));
        } else if line.starts_with('#') {
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            stanza.push((field.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    entries
}

fn entries_of(stanza: &[(String, String)]) -> Vec<Entry> {
    let words = |wanted: &str| -> Vec<String> {
        let fields = stanza.iter().filter(|(field, _)| field == wanted);
        fields
            .flat_map(|(_, value)| value.split_whitespace().map(str::to_owned))
            .collect()
    };
    let off = words("enabled")
        .first()
        .is_some_and(|v| v == "no" || v == "false");
    if off || !words("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let (uris, suites, components) = (words("uris"), words("suites"), words("components"));
    let entry = |uri: &String, suite: &String| Entry {
        uri: uri.clone(),
        suite: suite.clone(),
        components: components.clone(),
    };
    uris.iter()
        .flat_map(|uri| suites.iter().map(move |suite| entry(uri, suite)))
        .collect()
}

fn is_debian(entry: &Entry) -> bool {
    let (codename, pocket) = match entry.suite.split_once(['-', '/']) {
        Some((codename, pocket)) => (codename, Some(pocket)),
        None => (entry.suite.as_str(), None),
    };
    CODENAMES.contains(&codename)
        && pocket.is_none_or(|pocket| POCKETS.contains(&pocket))
        && entry.components.iter().any(|component| component == "main")
        && !entry.uri.starts_with("cdrom:")
}

fn choose(entries: &[Entry]) -> Option<Mirror> {
    let (security, archive): (Vec<&Entry>, Vec<&Entry>) = entries
        .iter()
        .filter(|entry| is_debian(entry))
        .partition(|entry| entry.suite.ends_with("security"));
    // A partner's archive may call its suites as Debian does; Debian's own is `.../debian`.
    let named = |name: &str, of: &[&Entry]| {
        let exact = of
            .iter()
            .find(|entry| entry.uri.trim_end_matches('/').ends_with(name));
        exact.or(of.first()).map(|entry| entry.uri.clone())
    };
    Some(Mirror {
        archive: named("/debian", &archive)?,
        security: named("/debian-security", &security),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
# another, inside
Components: main
 contrib
Signed-By:
 /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
";

    fn mirror(archive: &str, security: Option<&str>) -> Option<Mirror> {
        Some(Mirror {
            archive: archive.into(),
            security: security.map(Into::into),
        })
    }

    #[test]
    fn deb822_stanzas() {
        let entries = deb822(DEB822);
        let suites: Vec<&str> = entries.iter().map(|entry| entry.suite.as_str()).collect();
        assert_eq!(
            suites,
            ["bookworm", "bookworm-updates", "bookworm-security"]
        );
        assert_eq!(entries[0].components, ["main", "contrib"]);
        assert_eq!(
            choose(&entries),
            mirror(
                "http://mirror.example/debian",
                Some("http://mirror.example/debian-security/")
            )
        );
    }

    #[test]
    fn one_line_entries() {
        let text = "# deb http://no.example/debian trixie main\n\
            deb-src http://src.example/debian trixie main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian trixie main contrib # here\n\
            deb cdrom:[Debian]/ bookworm main\n\
            deb\thttp://s.example/debian-security trixie-security main\n";
        let entries = one_line(text);
        assert_eq!(entries.len(), 3);
        assert_eq!(
            choose(&entries),
            mirror(
                "http://m.example/debian",
                Some("http://s.example/debian-security")
            )
        );
    }

    #[test]
    fn third_parties_are_no_mirror() {
        let text = "deb https://a.example/apt cloud-sdk-bookworm main\n\
            deb https://b.example/linux/debian bookworm stable\n\
            deb https://c.example/apt bookworm-pgdg main\n\
            deb https://d.example/x nodistro main\n";
        assert_eq!(choose(&one_line(text)), None);
    }

    #[test]
    fn debians_own_is_preferred_to_a_partner_with_the_same_suites() {
        let text = "deb https://partner.example/apt bookworm main\n\
            deb https://m.example/debian bookworm main\n";
        assert_eq!(
            choose(&one_line(text)),
            mirror("https://m.example/debian", None)
        );
    }

    #[test]
    fn folders_are_read_as_apt_reads_them() {
        let etc = tempfile::tempdir().expect("a folder");
        let parts = etc.path().join("sources.list.d");
        std::fs::create_dir(&parts).expect("a folder");
        assert!(matches!(
            Mirror::configured(etc.path()),
            Err(NoMirror::NoneDebian(_))
        ));
        std::fs::write(
            parts.join("debian.sources.bak"),
            "deb http://bad.example/debian sid main",
        )
        .expect("written");
        std::fs::write(parts.join("debian.sources"), DEB822).expect("written");
        let found = Mirror::configured(etc.path()).expect("found");
        assert_eq!(found.archive, "http://mirror.example/debian");
    }
}
