//! Both ways between releases that know different states, in short: the rest is `make compat`.

use anyhow::ensure;
use stillpoint_tests::compat::{
    contents_are_as_announced, furnished_to_and_fro, plain_to_and_fro, refused_by_name,
};
use stillpoint_tests::furnished::Furnished;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::Release;
use stillpoint_tests::saved::state_of;
use stillpoint_tests::wire;

#[test]
fn a_later_release_takes_all_kinds_of_devices_and_gives_them_back() -> anyhow::Result<()> {
    needs_kvm!();
    let name = "a_later_release_takes_all_kinds_of_devices_and_gives_them_back";
    if !wire::is_beside(name)? {
        return Ok(());
    }
    let hops = furnished_to_and_fro(Release::Current, Release::Later, true)?;
    // Format 4 is known to one of them only; and what the later one writes is longer by its remarks.
    ensure!(hops.iter().all(|hop| hop.format == 3), "{hops:#?}");
    Ok(())
}

#[test]
fn the_states_of_two_releases_differ_and_a_newer_format_is_used_by_those_that_know_it()
-> anyhow::Result<()> {
    needs_kvm!();
    let mut guest = Furnished::boot(Release::Current, false)?;
    let remark = stillpoint_state_remark();
    let has_remark = |bytes: &[u8]| bytes.windows(remark.len()).any(|part| part == remark);
    ensure!(
        !has_remark(&state_of(&guest.vm, 3)?.bytes),
        "a remark of ours"
    );
    contents_are_as_announced(&guest.vm, 3)?;
    for format in [3, 4] {
        guest.send()?;
        let report = guest.vm.must_move(Release::Later)?;
        ensure!(
            report.state_format == format,
            "format {}",
            report.state_format
        );
        guest.came_through()?;
    }
    ensure!(
        has_remark(&state_of(&guest.vm, 3)?.bytes),
        "no remark of the later one's"
    );
    for format in [3, 4] {
        contents_are_as_announced(&guest.vm, format)?;
    }
    guest.end()
}

/// What the later release writes into every section (`stillpoint_state::later::REMARK`, in builds
/// with that feature).
fn stillpoint_state_remark() -> &'static [u8] {
    b"by a later release"
}

#[test]
fn an_older_release_takes_a_guest_that_its_format_carries() -> anyhow::Result<()> {
    needs_kvm!();
    let hops = plain_to_and_fro(Release::Compat, Release::Current)?;
    ensure!(hops.iter().all(|hop| hop.format == 1), "{hops:#?}");
    Ok(())
}

#[test]
fn a_section_that_is_not_known_is_refused_by_name_before_the_freeze() -> anyhow::Result<()> {
    needs_kvm!();
    refused_by_name("section", &["journal"], false).map(drop)
}

#[test]
fn a_field_that_is_not_known_is_refused_by_name_before_the_freeze() -> anyhow::Result<()> {
    needs_kvm!();
    refused_by_name("field", &["serial", "900 (fifo_depth)"], false).map(drop)
}

#[test]
fn a_field_that_only_the_state_shows_is_refused_by_name_and_the_guest_goes_on() -> anyhow::Result<()>
{
    needs_kvm!();
    refused_by_name("hidden-field", &["serial", "field 900"], true).map(drop)
}
