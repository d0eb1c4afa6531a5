//! The documents of `/metadata/scheduledevents`, byte for byte, for each api-version.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::model::{Notice, Pause, PauseState};

/// An api-version of `/metadata/scheduledevents`. Others than these are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 2017-03-01, the preview: names of resources begin with `_`.
    Preview,
    /// 2017-08-01.
    V2017_08,
    /// 2017-11-01.
    V2017_11,
    /// 2019-01-01.
    V2019_01,
    /// 2019-04-01: `Description`.
    V2019_04,
    /// 2019-08-01: `EventSource`.
    V2019_08,
    /// 2020-07-01: `DurationInSeconds`.
    V2020_07,
}

/// Every api-version, oldest first.
pub const VERSIONS: [(&str, Version); 7] = [
    ("2017-03-01", Version::Preview),
    ("2017-08-01", Version::V2017_08),
    ("2017-11-01", Version::V2017_11),
    ("2019-01-01", Version::V2019_01),
    ("2019-04-01", Version::V2019_04),
    ("2019-08-01", Version::V2019_08),
    ("2020-07-01", Version::V2020_07),
];

impl Version {
    /// The version of that date.
    pub fn of(date: &str) -> Option<Self> {
        let found = VERSIONS.iter().find(|(known, _)| *known == date);
        found.map(|(_, version)| *version)
    }
}

// The order of the fields is the order on the wire.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    document_incarnation: u64,
    events: Vec<Event>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    event_id: String,
    event_status: &'static str,
    event_type: &'static str,
    resource_type: &'static str,
    resources: Vec<String>,
    not_before: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_source: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_in_seconds: Option<u64>,
}

/// The document with these events.
pub fn document(incarnation: u64, seen: &[(&Pause, &Notice)], version: Version) -> String {
    let events = seen
        .iter()
        .map(|(pause, notice)| event(pause, notice, version));
    let document = Document {
        document_incarnation: incarnation,
        events: events.collect(),
    };
    serde_json::to_string(&document).expect("strings and numbers are always JSON")
}

fn event(pause: &Pause, notice: &Notice, version: Version) -> Event {
    let started = pause.state != PauseState::Scheduled;
    let underscore = match version {
        Version::Preview => "_",
        _ => "",
    };
    let since = |first| version >= first;
    Event {
        event_id: notice.event.to_string(),
        event_status: if started { "Started" } else { "Scheduled" },
        event_type: "Freeze",
        resource_type: "VirtualMachine",
        resources: notice
            .vms
            .iter()
            .map(|vm| format!("{underscore}{vm}"))
            .collect(),
        not_before: match started {
            true => String::new(),
            false => date(pause.not_before_unix_s),
        },
        description: since(Version::V2019_04).then(|| pause.description.clone()),
        event_source: since(Version::V2019_08).then_some("Platform"),
        duration_in_seconds: since(Version::V2020_07).then(|| seconds(pause.expected_ns)),
    }
}

/// Whole seconds, and one at least: 0 would say that nothing is interrupted.
fn seconds(ns: u64) -> u64 {
    ns.div_ceil(1_000_000_000).max(1)
}

/// `Mon, 19 Sep 2016 18:29:47 GMT`: RFC 1123, 29 bytes.
pub fn date(unix_s: u64) -> String {
    httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(unix_s))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_rfc_1123() {
        assert_eq!(date(1_474_309_787), "Mon, 19 Sep 2016 18:29:47 GMT");
        assert_eq!(date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        let months = "JanFebMarAprMayJunJulAugSepOctNovDec";
        for day in 0..20_000_u64 {
            // A time of day that moves too.
            let text = date(day * 86_400 + day % 86_400);
            let parts: Vec<&str> = text.split([' ', ':']).collect();
            let [weekday, of_month, month, year, hour, minute, second, "GMT"] = parts[..] else {
                panic!("{text}");
            };
            // 1 January 1970 was a Thursday.
            let weekdays = ["Thu,", "Fri,", "Sat,", "Sun,", "Mon,", "Tue,", "Wed,"];
            assert_eq!(
                weekday,
                weekdays[usize::try_from(day % 7).unwrap()],
                "{text}"
            );
            assert!(months.find(month).is_some_and(|at| at % 3 == 0), "{text}");
            let lengths = [of_month, hour, minute, second].map(str::len);
            assert_eq!((lengths, year.len(), text.len()), ([2; 4], 4, 29), "{text}");
        }
    }

    #[test]
    fn a_pause_of_less_than_a_second_is_one_second() {
        assert_eq!(seconds(0), 1);
        assert_eq!(seconds(300_000), 1);
        assert_eq!(seconds(1_000_000_001), 2);
    }
}
