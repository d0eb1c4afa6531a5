//! Maintenance windows: when swaps may begin, by the clocks of the place.
//!
//! A window is written `DAYS TIME LENGTH ZONE`, as in `Sat,Sun 01:00 4h Europe/Berlin`: it opens at
//! that time of these days by that zone's clocks, summer time included, and closes so much later. Where
//! clocks skip its opening it opens when they have skipped, and where they run through it twice,
//! the first time.

use std::str::FromStr;
use std::time::Duration;

use jiff::civil::{Time, Weekday};
use jiff::fmt::friendly::{Spacing, SpanPrinter};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan, ZonedDateTime};
use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// A window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Window {
    days: Vec<Weekday>,
    opens: Time,
    lasts: Duration,
    zone: TimeZone,
}

/// Whether swaps may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// Until then.
    OpenUntil(Moment),
    /// Not before then.
    ClosedUntil(Moment),
}

impl Window {
    /// How long it is open.
    pub fn lasts(&self) -> Duration {
        self.lasts
    }

    /// Whether it is open at `now`.
    pub fn at(&self, now: Moment) -> Opening {
        // One that opened long ago may be open still, so the search begins before today.
        let back = i64::try_from(self.lasts.as_secs() / 86_400 + 1).unwrap_or(8);
        let mut day = zoned(now, &self.zone).date().saturating_sub(back.days());
        // Every weekday is within 8 days of any day, however clocks are changed meanwhile.
        for _ in 0..back + 9 {
            if self.days.contains(&day.weekday())
                && let Ok(opens) = day
                    .to_datetime(self.opens)
                    .to_zoned_datetime(self.zone.clone())
            {
                let opens = moment(&opens);
                let closes = opens.after(self.lasts);
                if now < opens {
                    return Opening::ClosedUntil(opens);
                }
                if now < closes {
                    return Opening::OpenUntil(closes);
                }
            }
            day = day.saturating_add(1.day());
        }
        // Only at the end of time.
        Opening::ClosedUntil(Moment(u64::MAX))
    }
}

/// What several windows come to at `now`: with none of them it is always open.
pub fn opening(windows: &[Window], now: Moment) -> Opening {
    let mut closed = None;
    let mut open = None;
    for window in windows {
        match window.at(now) {
            Opening::OpenUntil(closes) => open = open.max(Some(closes)),
            Opening::ClosedUntil(opens) => {
                closed = Some(closed.map_or(opens, |earlier: Moment| earlier.min(opens)));
            }
        }
    }
    match (open, closed) {
        (Some(closes), _) => Opening::OpenUntil(closes),
        (None, Some(opens)) => Opening::ClosedUntil(opens),
        (None, None) => Opening::OpenUntil(Moment(u64::MAX)),
    }
}

fn zoned(at: Moment, zone: &TimeZone) -> ZonedDateTime {
    let timestamp = Timestamp::from_nanosecond(i128::from(at.0)).unwrap_or(Timestamp::MAX);
    timestamp.to_zoned_datetime(zone.clone())
}

fn moment(at: &ZonedDateTime) -> Moment {
    let ns = at.timestamp().as_nanosecond();
    Moment(u64::try_from(ns).unwrap_or(0))
}

/// Text that is no window.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no maintenance window: {why}; write days, time, length and time zone, such as \
     `Sat,Sun 01:00 4h Europe/Berlin`"
)]
pub struct NoWindow {
    text: String,
    why: String,
}

const DAYS: [(&str, Weekday); 7] = [
    ("Mon", Weekday::Monday),
    ("Tue", Weekday::Tuesday),
    ("Wed", Weekday::Wednesday),
    ("Thu", Weekday::Thursday),
    ("Fri", Weekday::Friday),
    ("Sat", Weekday::Saturday),
    ("Sun", Weekday::Sunday),
];

impl TryFrom<String> for Window {
    type Error = NoWindow;
    fn try_from(text: String) -> Result<Self, NoWindow> {
        text.parse()
    }
}

impl From<Window> for String {
    fn from(window: Window) -> Self {
        window.to_string()
    }
}

impl FromStr for Window {
    type Err = NoWindow;
    fn from_str(text: &str) -> Result<Self, NoWindow> {
        read(text).map_err(|why| NoWindow {
            text: text.to_owned(),
            why,
        })
    }
}

fn read(text: &str) -> Result<Window, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let &[days, opens, lasts, zone] = words.as_slice() else {
        return Err(format!("it has {} words and not four", words.len()));
    };
    let days = if days == "daily" {
        DAYS.iter().map(|&(_, day)| day).collect()
    } else {
        days.split(',').map(read_day).collect::<Result<_, _>>()?
    };
    let opens =
        Time::strptime("%H:%M", opens).map_err(|_| format!("`{opens}` is no time of day"))?;
    let length: SignedDuration = lasts
        .parse()
        .map_err(|_| format!("`{lasts}` is no length of time"))?;
    let lasts = Duration::try_from(length).unwrap_or_default();
    if lasts.is_zero() || lasts > Duration::from_secs(7 * 86_400) {
        return Err("its length is not between nothing and seven days".into());
    }
    // Of the zones that are built in: what is decided must not depend on the host's files.
    let zone = TimeZone::get(zone).map_err(|_| format!("no time zone is called `{zone}`"))?;
    Ok(Window {
        days,
        opens,
        lasts,
        zone,
    })
}

fn read_day(text: &str) -> Result<Weekday, String> {
    let found = DAYS.iter().find(|(name, _)| *name == text);
    found
        .map(|&(_, day)| day)
        .ok_or_else(|| format!("`{text}` is no day; days are Mon to Sun, or daily"))
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = DAYS.iter().filter(|(_, day)| self.days.contains(day));
        let days: Vec<&str> = named.map(|&(name, _)| name).collect();
        let days = if days.len() == 7 {
            "daily".into()
        } else {
            days.join(",")
        };
        let opens = self.opens.strftime("%H:%M");
        let lasts = SignedDuration::try_from(self.lasts).unwrap_or_default();
        let zone = self.zone.iana_name().unwrap_or("UTC");
        let lasts = SpanPrinter::new()
            .spacing(Spacing::None)
            .duration_to_string(&lasts);
        write!(f, "{days} {opens} {lasts} {zone}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Moment {
        moment(&text.parse::<ZonedDateTime>().expect(text))
    }

    fn window(text: &str) -> Window {
        text.parse().expect(text)
    }

    #[test]
    fn it_opens_by_the_clocks_of_its_place() {
        let window = window("Sat,Sun 01:00 4h Europe/Berlin");
        let friday = at("2026-11-27T12:00[Europe/Berlin]");
        let opens = at("2026-11-28T01:00[Europe/Berlin]");
        let closes = at("2026-11-28T05:00[Europe/Berlin]");
        assert_eq!(window.at(friday), Opening::ClosedUntil(opens));
        assert_eq!(window.at(opens), Opening::OpenUntil(closes));
        let sunday = at("2026-11-29T01:00[Europe/Berlin]");
        assert_eq!(window.at(closes), Opening::ClosedUntil(sunday));
        // Midnight UTC is one o'clock there.
        assert_eq!(opens, at("2026-11-28T00:00[UTC]"));
    }

    #[test]
    fn one_that_opened_yesterday_is_open() {
        let window = window("Sat 22:00 8h Asia/Kolkata");
        let sunday = at("2026-11-29T03:00[Asia/Kolkata]");
        let closes = at("2026-11-29T06:00[Asia/Kolkata]");
        assert_eq!(window.at(sunday), Opening::OpenUntil(closes));
    }

    #[test]
    fn one_of_several_days_is_open_to_its_end() {
        let window = window("Fri 22:00 60h Europe/Berlin");
        let monday = at("2026-11-30T09:59[Europe/Berlin]");
        let closes = at("2026-11-30T10:00[Europe/Berlin]");
        assert_eq!(window.at(monday), Opening::OpenUntil(closes));
    }

    #[test]
    fn clocks_that_are_changed_neither_skip_it_nor_open_it_twice() {
        // 02:30 is not there on 2027-03-28, and there twice on 2027-10-31.
        let window = window("Sun 02:30 1h Europe/Berlin");
        let before = at("2027-03-28T00:00[Europe/Berlin]");
        let opens = at("2027-03-28T03:30[Europe/Berlin]");
        assert_eq!(window.at(before), Opening::ClosedUntil(opens));
        let before = at("2027-10-31T00:00[Europe/Berlin]");
        let first = at("2027-10-31T02:30+02:00[Europe/Berlin]");
        assert_eq!(window.at(before), Opening::ClosedUntil(first));
        let next = at("2027-11-07T02:30[Europe/Berlin]");
        let closed = first.after(Duration::from_secs(3600));
        assert_eq!(window.at(closed), Opening::ClosedUntil(next));
    }

    #[test]
    fn of_several_the_one_that_is_open_longest_counts() {
        let windows = [
            window("Sat 01:00 2h UTC"),
            window("Sat 02:00 4h UTC"),
            window("Mon 01:00 1h UTC"),
        ];
        let inside = at("2026-11-28T02:30[UTC]");
        let closes = at("2026-11-28T06:00[UTC]");
        assert_eq!(opening(&windows, inside), Opening::OpenUntil(closes));
        let monday = at("2026-11-30T01:00[UTC]");
        assert_eq!(opening(&windows, closes), Opening::ClosedUntil(monday));
        assert_eq!(opening(&[], closes), Opening::OpenUntil(Moment(u64::MAX)));
    }

    #[test]
    fn windows_are_read_as_they_are_shown() {
        for text in [
            "Sat,Sun 01:00 4h Europe/Berlin",
            "daily 22:30 90m America/New_York",
        ] {
            let again = window(text).to_string();
            assert_eq!(window(&again), window(text), "{again}");
        }
    }

    #[test]
    fn what_is_no_window_is_refused_with_the_reason() {
        for (bad, why) in [
            ("", "0 words"),
            ("Sat 01:00 4h", "3 words"),
            ("Sam 01:00 4h UTC", "no day"),
            ("Sat 25:00 4h UTC", "no time of day"),
            ("Sat 01:00 4 UTC", "no length"),
            ("Sat 01:00 0s UTC", "seven days"),
            ("Sat 01:00 -4h UTC", "seven days"),
            ("Sat 01:00 200h UTC", "seven days"),
            ("Sat 01:00 4h Mars/Olympus", "Mars/Olympus"),
        ] {
            let error = bad.parse::<Window>().expect_err(bad).to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
