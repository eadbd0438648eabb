//! Mistakes that tests build into the protocol, to show that the checks find them.

use super::Protocol;

/// One thing done wrongly. Production code asks [`Protocol::makes`], which is `false` at compile time there.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Mistake {
    /// A sharer gives up its copy and does not say so.
    DropAck,
    /// A sharer says that its copy is gone before it is.
    AckBeforeUnmap,
    /// A sharer tells the home, not the requester, that its copy is gone.
    AckTheHome,
    /// A writer goes on when the grant came, without the sharers' answers.
    WriteBeforeAcks,
    /// The home announces one ack less than there are sharers.
    MiscountSharers,
    /// The home does not note who it gave a copy to.
    ForgetSharer,
    /// The home believes that who asks to write has a copy still.
    SkipBytesOfUpgrade,
    /// The home grants while the owner's bytes are still on their way to it.
    GrantWhileBusy,
    /// The home takes an evicted page's bytes though the page was handed on in the meantime.
    IgnoreEvictionRace,
    /// The home takes an evicted page back and does not note it.
    ForgetPut,
    /// A node forgets a page when it evicts it, before the home knows.
    ForgetBeforePutAck,
    /// A fault on a page that is being evicted is forgotten.
    ForgetRefault,
    /// An owner goes on writing after it gave out a copy.
    KeepWriting,
    /// An owner gives a reader a copy and the home none.
    LoseWriteback,
    /// An invalidation of a copy that is on its way is answered at once, and the copy used when it comes.
    AnswerForComingCopy,
    /// What waits for a held page is forgotten at its release.
    ForgetDeferred,
    /// The frame of a page of which a copy is kept is given back.
    FreeSharedFrame,
    /// The home grants a run of pages without asking whether it still has them all.
    RunIntoGivenPages,
    /// A page of a run that the answer did not bring is not asked for, though a fault waits for it.
    ForgetRestOfRun,
    /// A page that was given back keeps its frame.
    KeepFrame,
    /// A fault does not wait for a frame.
    IgnoreBudget,
    /// A fault that waited for a frame is forgotten.
    ForgetParked,
    /// The home gives up the frame of a page that others have.
    PunchSharedPage,
    /// The home gives up the frame of a page for which somebody waits there.
    PunchWantedPage,
    /// The home does not say that it has discarded a page.
    ForgetDiscarded,
    /// The home lets a device read its own frame of a page that another node owns.
    LoadFromTheHome,
    /// The home says that a page was overwritten while others can still read it as it was.
    AnswerStoreAtOnce,
    /// The home does not say that a page was overwritten.
    ForgetStored,
    /// An owner carries an operation out twice.
    OperateTwice,
    /// An owner carries an operation out on the frame of a page that has left.
    OperateOnPageThatLeft,
    /// The home carries an operation out on its frame of a page that another node owns.
    OperateAtHome,
    /// The home carries an operation out on a page that others read.
    OperateOnShared,
    /// An operation is refused and carried out.
    OperateAndRefuse,
    /// Who cannot carry an operation out does not say so.
    ForgetRefusal,
    /// A CPU goes on when its operation was sent, so that the next may overtake it.
    DoNotWait,
    /// A fault that cannot be shipped, and waits with one that can, is forgotten when that is.
    ForgetToMove,
    /// The home pushes a page when a writer asks for it, before what it has to write.
    PushTooEarly,
    /// The home gives a page to a writer while it does not know who has taken a push of it.
    GrantWhilePushing,
    /// The home answers a question that has passed the push that was its answer.
    AnswerPassedGet,
    /// A reader does not answer a push.
    ForgetPushed,
    /// A node takes a push of a page that it is giving back.
    TakePushWhileLeaving,
}

impl Mistake {
    /// All of them.
    #[cfg(test)]
    pub const ALL: [Mistake; 41] = [
        Mistake::DropAck,
        Mistake::AckBeforeUnmap,
        Mistake::AckTheHome,
        Mistake::WriteBeforeAcks,
        Mistake::MiscountSharers,
        Mistake::ForgetSharer,
        Mistake::SkipBytesOfUpgrade,
        Mistake::GrantWhileBusy,
        Mistake::IgnoreEvictionRace,
        Mistake::ForgetPut,
        Mistake::ForgetBeforePutAck,
        Mistake::ForgetRefault,
        Mistake::KeepWriting,
        Mistake::LoseWriteback,
        Mistake::AnswerForComingCopy,
        Mistake::ForgetDeferred,
        Mistake::FreeSharedFrame,
        Mistake::RunIntoGivenPages,
        Mistake::ForgetRestOfRun,
        Mistake::KeepFrame,
        Mistake::IgnoreBudget,
        Mistake::ForgetParked,
        Mistake::PunchSharedPage,
        Mistake::PunchWantedPage,
        Mistake::ForgetDiscarded,
        Mistake::LoadFromTheHome,
        Mistake::AnswerStoreAtOnce,
        Mistake::ForgetStored,
        Mistake::OperateTwice,
        Mistake::OperateOnPageThatLeft,
        Mistake::OperateAtHome,
        Mistake::OperateOnShared,
        Mistake::OperateAndRefuse,
        Mistake::ForgetRefusal,
        Mistake::DoNotWait,
        Mistake::ForgetToMove,
        Mistake::PushTooEarly,
        Mistake::GrantWhilePushing,
        Mistake::AnswerPassedGet,
        Mistake::ForgetPushed,
        Mistake::TakePushWhileLeaving,
    ];
}

impl Protocol {
    /// Whether a test built this mistake in.
    #[cfg(test)]
    pub(super) fn makes(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    /// No.
    #[cfg(not(test))]
    #[inline(always)]
    pub(super) const fn makes(&self, _: Mistake) -> bool {
        false
    }

    /// Builds a mistake in.
    #[cfg(test)]
    pub(crate) fn build_in(&mut self, mistake: Mistake) {
        self.mistake = Some(mistake);
    }
}
