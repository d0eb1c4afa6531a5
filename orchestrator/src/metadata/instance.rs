//! `/metadata/instance`: what a VM is told of itself. In JSON every value is a string, and what is
//! not known is there as `""`. A value is seen from the api-version on that had it first.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::asked::Format;
use crate::model::{Group, Profile, VmName, VmRecord};

/// Every api-version, oldest first. `/metadata/scheduledevents` has a list of its own.
pub const VERSIONS: [&str; 34] = [
    "2017-03-01",
    "2017-04-02",
    "2017-08-01",
    "2017-10-01",
    "2017-12-01",
    "2018-02-01",
    "2018-04-02",
    "2018-10-01",
    "2019-02-01",
    "2019-03-11",
    "2019-04-30",
    "2019-06-01",
    "2019-06-04",
    "2019-08-01",
    "2019-08-15",
    "2019-11-01",
    "2020-06-01",
    "2020-07-15",
    "2020-09-01",
    "2020-10-01",
    "2020-12-01",
    "2021-01-01",
    "2021-02-01",
    "2021-03-01",
    "2021-05-01",
    "2021-10-01",
    "2021-11-01",
    "2021-11-15",
    "2021-12-13",
    "2023-07-01",
    "2023-11-15",
    "2024-03-15",
    "2024-07-17",
    "2025-04-07",
];

/// What the service knows of one VM. It is the same for as long as the VM runs.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Name; what events call it.
    pub name: VmName,
    /// Whose events it sees.
    pub group: Group,
    vm_id: String,
    profile: Profile,
    macs: Vec<[u8; 6]>,
}

impl Facts {
    /// Of this VM.
    pub fn of(vm: &VmRecord) -> Self {
        let macs = (0..vm.spec.nets.len()).filter_map(|n| vm.spec.mac(n));
        Self {
            name: vm.name.clone(),
            group: Group::of(&vm.name, &vm.profile),
            vm_id: vm_id(vm),
            profile: vm.profile.clone(),
            macs: macs.collect(),
        }
    }

    /// The answer at this path below `/metadata/instance`. `None`: there is nothing.
    /// `Some(Err(()))`: a single value, which is text and was asked for as JSON.
    pub fn answer(
        &self,
        path: &[&str],
        version: &str,
        format: Format,
    ) -> Option<Result<String, ()>> {
        let mut at = &self.document(version);
        for part in path {
            at = match at {
                Value::Object(map) => {
                    let mut entries = map.iter();
                    entries.find(|(key, _)| key.eq_ignore_ascii_case(part))?.1
                }
                Value::Array(list) => list.get(part.parse::<usize>().ok()?)?,
                _ => return None,
            };
        }
        Some(match (at, format) {
            (Value::String(text), Format::Text) => Ok(text.clone()),
            (Value::String(_), Format::Json) => Err(()),
            (value, Format::Json) => Ok(value.to_string()),
            (value, Format::Text) => Ok(listing(value)),
        })
    }

    fn document(&self, version: &str) -> Value {
        json!({ "compute": self.compute(version), "network": self.network() })
    }

    fn compute(&self, version: &str) -> Value {
        let profile = &self.profile;
        let set = profile.availability_set.clone().unwrap_or_default();
        let tags = profile.tags.iter();
        let list: Vec<_> = tags
            .map(|(name, value)| json!({ "name": name, "value": value }))
            .collect();
        let tags = profile.tags.iter().map(|(k, v)| format!("{k}:{v}"));
        let tags = tags.collect::<Vec<_>>().join(";");
        let known: [(&str, &str, Value); 20] = [
            ("2021-11-15", "host", json!({ "id": "" })),
            ("2021-11-15", "hostGroup", json!({ "id": "" })),
            ("2017-04-02", "location", "".into()),
            ("2017-04-02", "name", self.name.to_string().into()),
            ("2017-04-02", "offer", "".into()),
            ("2017-04-02", "osType", "Linux".into()),
            ("2017-08-01", "placementGroupId", set.into()),
            (
                "2017-04-02",
                "platformFaultDomain",
                profile.fault_domain.to_string().into(),
            ),
            (
                "2017-04-02",
                "platformUpdateDomain",
                profile.update_domain.to_string().into(),
            ),
            ("2017-04-02", "publisher", "".into()),
            ("2017-08-01", "resourceGroupName", "".into()),
            ("2019-03-11", "resourceId", "".into()),
            ("2017-04-02", "sku", "".into()),
            ("2017-08-01", "subscriptionId", "".into()),
            ("2017-08-01", "tags", tags.into()),
            ("2019-06-04", "tagsList", list.into()),
            ("2021-01-01", "userData", "".into()),
            ("2017-04-02", "version", "".into()),
            ("2017-04-02", "vmId", self.vm_id.clone().into()),
            ("2017-04-02", "vmSize", "".into()),
        ];
        let later = [("2017-12-01", "vmScaleSetName"), ("2017-12-01", "zone")];
        let later = later.map(|(first, key)| (first, key, Value::from("")));
        // Dates of this form compare as text.
        let seen = known.into_iter().chain(later);
        let seen = seen.filter(|(first, ..)| version >= *first);
        Value::Object(
            seen.map(|(_, key, value)| (key.to_owned(), value))
                .collect(),
        )
    }

    fn network(&self) -> Value {
        let none: [Value; 0] = [];
        let interfaces = self.macs.iter().map(|mac| {
            let mac: String = mac.iter().map(|byte| format!("{byte:02X}")).collect();
            json!({
                "ipv4": { "ipAddress": none, "subnet": none },
                "ipv6": { "ipAddress": none },
                "macAddress": mac,
            })
        });
        let mut network = Map::new();
        network.insert("interface".into(), interfaces.collect::<Vec<_>>().into());
        Value::Object(network)
    }
}

/// The keys below, one a line; those with more below them end in `/`.
fn listing(value: &Value) -> String {
    let line = |key: String, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => key + "/",
        _ => key,
    };
    let lines: Vec<_> = match value {
        Value::Object(map) => map.iter().map(|(k, v)| line(k.clone(), v)).collect(),
        Value::Array(list) => (0..)
            .zip(list)
            .map(|(n, v)| line(format!("{n}"), v))
            .collect(),
        _ => Vec::new(),
    };
    lines.join("\n")
}

/// A GUID that is the same for as long as the VM is, whoever runs it.
fn vm_id(vm: &VmRecord) -> String {
    let mut digest = Sha256::new();
    digest.update(b"vmId");
    digest.update(vm.name.as_str());
    digest.update(vm.created_at_unix_ns.to_le_bytes());
    let bytes: [u8; 32] = digest.finalize().into();
    guid(bytes[..16].try_into().expect("16 of 32 bytes")).to_lowercase()
}

/// Sixteen bytes as a GUID of version 4, upper case.
pub fn guid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
    let [a, b, c, d, e] = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    format!("{a}-{b}-{c}-{d}-{e}")
}
