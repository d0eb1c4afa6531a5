//! Who sits in which update domain: given, or the one whose turn it is.

use crate::model::{Code, Domain, DomainCount, Problem, VmName};
use crate::store::shared::{Change, Committed, Entry, Expect, SharedError};

use super::record::SetRecord;
use super::{Fleet, SETS, read, written};

/// How often a change is tried that others were quicker with.
const TRIES: u32 = 16;

/// What is wanted of a seat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The update domain; the one whose turn it is when absent.
    pub domain: Option<u16>,
    /// How many update domains the set has, where this is its first member.
    pub of: Option<u8>,
}

impl Fleet {
    fn member(&self, vm: &VmName) -> String {
        format!("{}/{vm}", self.me)
    }

    /// Seats a VM in a set. One that has its seat keeps it, unless another is given.
    pub async fn seat(&self, set: &str, vm: &VmName, wish: Wish) -> Result<Domain, Problem> {
        let given = wish.domain.map(domain).transpose()?;
        let count = wish.of.map(DomainCount::new).transpose();
        let count = count.map_err(|e| Problem::new(Code::BadRequest, e.to_string()))?;
        let member = self.member(vm);
        let mut seated = Domain::of_joined(0, DomainCount::default());
        self.change_set(set, |record| {
            let record = record.get_or_insert_with(|| SetRecord {
                domains: count.unwrap_or_default().number(),
                joined: 0,
                members: std::collections::BTreeMap::new(),
            });
            if let Some(wanted) = count
                && wanted.number() != record.domains
            {
                let message = format!(
                    "the availability set `{set}` has {} update domains and not {}: that is fixed \
                     when its first member joins it",
                    record.domains,
                    wanted.number()
                );
                return Err(Problem::new(Code::BadRequest, message));
            }
            let kept = record.members.get(&member);
            let kept = kept.and_then(|&number| Domain::new(number).ok());
            let of = DomainCount::new(record.domains).unwrap_or_default();
            if let (None, None) = (given, kept) {
                record.joined += 1;
            }
            let turn = usize::try_from(record.joined.saturating_sub(1)).unwrap_or(0);
            seated = given.or(kept).unwrap_or(Domain::of_joined(turn, of));
            record.members.insert(member.clone(), seated.number());
            Ok(())
        })
        .await?;
        Ok(seated)
    }

    /// Takes a VM's seat away; the last member takes its set with it.
    pub async fn unseat(&self, set: &str, vm: &VmName) -> Result<(), Problem> {
        self.vacate(set, &self.member(vm)).await
    }

    /// The same of a member that is named as `HOST/VM`.
    pub(super) async fn vacate(&self, set: &str, member: &str) -> Result<(), Problem> {
        self.change_set(set, |record| {
            if let Some(known) = record {
                known.members.remove(member);
                if known.members.is_empty() {
                    *record = None;
                }
            }
            Ok(())
        })
        .await
    }

    async fn change_set(
        &self,
        set: &str,
        mut change: impl FnMut(&mut Option<SetRecord>) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        self.is_us()?;
        let key = format!("{SETS}{set}");
        for _ in 0..TRIES {
            let entry = self.shared.get(&key).await?;
            let before: Option<SetRecord> = entry.as_ref().map(read).transpose()?;
            let mut after = before.clone();
            change(&mut after)?;
            if after == before {
                return Ok(());
            }
            let change = changed(&key, entry.as_ref(), after.as_ref());
            match self.shared.commit(vec![change], None).await? {
                Committed::Done(_) => return Ok(()),
                Committed::Refused => {}
            }
        }
        let message = format!("the availability set `{set}` changes all the time; ask again");
        Err(Problem::new(Code::Failed, message))
    }

    /// All sets.
    pub async fn sets(&self) -> Result<Vec<(String, SetRecord)>, SharedError> {
        let entries = self.shared.list(SETS).await?.entries;
        let named = |entry: &Entry| {
            let name = entry.key.trim_start_matches(SETS).to_owned();
            Ok((name, read(entry)?))
        };
        entries.iter().map(named).collect()
    }
}

fn changed(key: &str, before: Option<&Entry>, after: Option<&SetRecord>) -> Change {
    let expect = before.map_or(Expect::Absent, |entry| Expect::Version(entry.version));
    match after {
        Some(record) => Change::put(key, expect, written(record)),
        None => Change::remove(key, expect),
    }
}

fn domain(number: u16) -> Result<Domain, Problem> {
    let small = u8::try_from(number).unwrap_or(u8::MAX);
    Domain::new(small).map_err(|e| {
        let message = format!("field `update_domain`: {e}");
        Problem::new(Code::BadRequest, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::shared::{Memory, Shared};

    fn fleet() -> Fleet {
        crate::fleet::tests::fleet(&Shared::Memory(Memory::default()), "h1", "one")
    }

    fn vm(name: &str) -> VmName {
        VmName::try_from(name.to_owned()).expect("name")
    }

    #[tokio::test]
    async fn the_sixth_joins_the_first_of_five_and_a_seat_is_kept() {
        let fleet = fleet();
        let mut domains = Vec::new();
        for number in 0..6 {
            let vm = vm(&format!("web-{number}"));
            let seat = fleet.seat("web", &vm, Wish::default()).await;
            domains.push(seat.expect("a seat").number());
        }
        assert_eq!(domains, [0, 1, 2, 3, 4, 0]);
        let again = fleet.seat("web", &vm("web-3"), Wish::default()).await;
        assert_eq!(again.expect("its seat").number(), 3);
        let given = Wish {
            domain: Some(17),
            of: None,
        };
        let given = fleet.seat("web", &vm("web-9"), given).await;
        assert_eq!(given.expect("that seat").number(), 17);
    }

    #[tokio::test]
    async fn domains_that_cannot_be_are_refused_and_nothing_is_written() {
        let fleet = fleet();
        let wish = |domain, of| Wish { domain, of };
        for (wish, why) in [
            (wish(Some(20), None), "0 to 19"),
            (wish(Some(300), None), "0 to 19"),
            (wish(None, Some(21)), "1 to 20"),
        ] {
            let problem = fleet.seat("web", &vm("a"), wish).await.expect_err(why);
            assert!(problem.message.contains(why), "{problem}");
        }
        assert_eq!(fleet.sets().await.expect("sets"), []);
        let two = fleet.seat("web", &vm("a"), wish(None, Some(2))).await;
        assert_eq!(two.expect("a seat").number(), 0);
        let problem = fleet.seat("web", &vm("b"), wish(None, Some(3))).await;
        let problem = problem.expect_err("it has two");
        assert!(
            problem.message.contains("has 2 update domains"),
            "{problem}"
        );
        fleet.unseat("web", &vm("a")).await.expect("unseat");
        assert_eq!(fleet.sets().await.expect("sets"), []);
    }
}
