//! Rules that can be left out. A model without one of them must fail, and by the property that
//! the rule is there for: so the check is known to see.

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The drop of a frozen guest lets it run on without a look at the word.
    UnsealWithoutTheWord,
    /// A predecessor whose budget has ended runs the guest on without winning the word.
    ReclaimWithoutTheWord,
    /// A successor runs what it was told to be given up without winning the word.
    TakeWithoutTheWord,
    /// A successor that hears nothing takes its predecessor for dead.
    TakeFromTheLiving,
    /// All attempts have the same number.
    Epochs,
    /// Give-up is final.
    NoReclaim,
    /// A successor never takes from a dead predecessor.
    NothingFromTheDead,
    /// The daemon lets a predecessor hang that has sealed its state.
    NothingRevoked,
    /// A successor that was given what is revoked then takes that for a loss, and leaves.
    RevokedIsLost,
    /// The daemon kills a predecessor that it thinks hangs without winning the word first.
    KillWithoutTheWord,
    /// The daemon takes silence for the predecessor's death, and kills it.
    KillTheSilent,
    /// The daemon believes "moved" without a look at the word.
    BelieveMoved,
    /// A daemon that begins anew forgets what was in progress.
    Forget,
}

impl Broken {
    /// All of them, each with the property that must fail without it.
    pub const ALL: [(Self, &'static str); 13] = [
        (Self::UnsealWithoutTheWord, "no old state is run"),
        (Self::ReclaimWithoutTheWord, "one process runs the guest"),
        (Self::TakeWithoutTheWord, "one process runs the guest"),
        (Self::TakeFromTheLiving, "nothing is stranded"),
        (Self::Epochs, "no old state is run"),
        (Self::NoReclaim, "nothing is stranded"),
        (Self::NothingFromTheDead, "nothing is stranded"),
        (Self::NothingRevoked, "nothing is stranded"),
        (Self::RevokedIsLost, "nothing is stranded"),
        (Self::KillWithoutTheWord, "nothing is stranded"),
        (Self::KillTheSilent, "nothing is stranded"),
        (Self::BelieveMoved, "records are true"),
        (Self::Forget, "records are true"),
    ];
}
