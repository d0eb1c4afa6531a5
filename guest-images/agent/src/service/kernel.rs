//! What the kernel tells of itself: its health and its log.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use stillpoint_agent::protocol::{Clocksource, Dmesg, Health, KernelLine};

/// A record of `/dev/kmsg` is no longer than this (`PRINTK_MESSAGE_MAX`, kernel/printk).
const RECORD: usize = 8192;
/// Text and lines in one answer: with every character escaped it still fits into a line.
const MAX_TEXT: usize = 192 << 10;
const MAX_LINES: usize = 4000;

/// How the guest is.
pub(super) fn health(init: bool) -> io::Result<Health> {
    let memory = read("/proc/meminfo")?;
    let uptime = read("/proc/uptime")?;
    Ok(Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        init,
        kernel: read("/proc/sys/kernel/osrelease")?,
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        uptime_ms: millis(uptime.split(' ').next().unwrap_or_default()),
        load: load(&read("/proc/loadavg")?),
        memory_total_kib: kib(&memory, "MemTotal:"),
        memory_available_kib: kib(&memory, "MemAvailable:"),
        cpus: count(&read("/sys/devices/system/cpu/online")?),
        clocksource: clocksource(),
    })
}

/// The kernel's clocksources; empty where it has no such list.
pub(super) fn clocksource() -> Clocksource {
    let file = |name| {
        read(&format!(
            "/sys/devices/system/clocksource/clocksource0/{name}"
        ))
        .unwrap_or_default()
    };
    let available = file("available_clocksource");
    Clocksource {
        current: file("current_clocksource"),
        available: available.split_whitespace().map(str::to_owned).collect(),
    }
}

fn read(path: &str) -> io::Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    Ok(text.trim_end().to_owned())
}

/// `12.34` seconds in milliseconds.
fn millis(text: &str) -> u64 {
    let (seconds, hundredths) = text.split_once('.').unwrap_or((text, "0"));
    let number = |text: &str| text.parse::<u64>().unwrap_or_default();
    number(seconds)
        .saturating_mul(1000)
        .saturating_add(number(hundredths).saturating_mul(10))
}

fn load(text: &str) -> [f64; 3] {
    let mut numbers = text
        .split(' ')
        .map(|number| number.parse().unwrap_or_default());
    [(); 3].map(|()| numbers.next().unwrap_or_default())
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim().split(' ').next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

/// How many CPUs a list such as `0-3,5` names.
fn count(list: &str) -> u32 {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.split(',').filter_map(range).sum()
}

/// The log, from after a line on, without those that are less grave than `max_level`.
pub(super) fn dmesg(after: Option<u64>, max_level: u8) -> io::Result<Dmesg> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let mut kmsg = File::options()
        .read(true)
        .custom_flags(flags)
        .open("/dev/kmsg")?;
    let mut answer = Dmesg::default();
    let mut text = 0;
    let mut record = [0; RECORD];
    loop {
        let length = match kmsg.read(&mut record) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answer),
            // What was to be read next is overwritten; the next read begins after it. The gap
            // in the numbers tells.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let line = line(&String::from_utf8_lossy(&record[..length]));
        let Some(line) = line.filter(|line| after.is_none_or(|after| line.seq > after)) else {
            continue;
        };
        if line.level > max_level {
            continue;
        }
        text += line.text.len();
        if text > MAX_TEXT || answer.lines.len() >= MAX_LINES {
            answer.more = true;
            return Ok(answer);
        }
        answer.lines.push(line);
    }
}

/// `priority,sequence,microseconds,flags...;text`, and below it properties of the device that
/// it is about (Documentation/ABI/testing/dev-kmsg).
fn line(record: &str) -> Option<KernelLine> {
    let (head, rest) = record.split_once(';')?;
    let mut head = head.split(',');
    let priority = head.next()?.parse::<u32>().ok()?;
    Some(KernelLine {
        // The three low bits; above them is the facility.
        level: u8::try_from(priority & 7).ok()?,
        seq: head.next()?.parse().ok()?,
        at_us: head.next()?.parse().ok()?,
        text: rest.lines().next().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_log_is_taken_apart() {
        let record = "30,339,5140900,-,caller=T1;NET: a;b\n SUBSYSTEM=net\n";
        let expected = KernelLine {
            seq: 339,
            level: 6,
            at_us: 5_140_900,
            text: "NET: a;b".to_owned(),
        };
        assert_eq!(line(record), Some(expected));
        assert_eq!(line("x,1,2,-;text"), None);
        assert_eq!(line(""), None);
    }

    #[test]
    fn numbers_of_the_kernel_are_read() {
        assert_eq!(count("0-3,5"), 5);
        assert_eq!(count("0"), 1);
        assert_eq!(count("3-1,x"), 0);
        assert_eq!(millis("12.34"), 12_340);
        assert_eq!(kib("MemTotal:   100 kB\nMemFree: 7 kB", "MemFree:"), 7);
        assert_eq!(load("0.50 0.25 1.00 1/2 3"), [0.5, 0.25, 1.0]);
    }

    #[test]
    fn this_machine_is_healthy_enough_to_say_so() {
        let health = health(false).unwrap();
        assert!(health.cpus > 0 && health.memory_total_kib > 0 && health.uptime_ms > 0);
        assert!(!health.kernel.is_empty() && !health.boot_id.is_empty());
    }
}
