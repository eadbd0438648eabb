//! The handshake: the two messages at the beginning of a session.

use snow::{Builder, HandshakeState};

use super::{Opener, PrivateKey, PublicKey, Sealer, SecureChannel, SecureError};

/// The pattern of a handshake: which keys are known before the first message.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Pattern {
    /// Both know the other's key: Noise KK.
    BothKnown,
    /// The caller knows whom it calls, and tells (sealed) who it is: Noise IK.
    CallerUnknown,
}

impl Pattern {
    fn name(self) -> &'static str {
        match self {
            Pattern::BothKnown => "Noise_KK_25519_AESGCM_SHA256",
            Pattern::CallerUnknown => "Noise_IK_25519_AESGCM_SHA256",
        }
    }

    /// Bytes of the first message.
    pub const fn first(self) -> usize {
        match self {
            Pattern::BothKnown => 48,
            Pattern::CallerUnknown => 96,
        }
    }

    /// Bytes of the second message.
    pub const SECOND: usize = 48;
}

/// One side of a handshake.
pub struct Handshake {
    state: HandshakeState,
    caller: bool,
}

impl Handshake {
    /// The calling side: call [`Handshake::write`], then [`Handshake::read`]. Both sides must give the same
    /// `prologue`, which is thereby proven too.
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: never with 32-byte keys.
    pub fn call(
        pattern: Pattern,
        own: &PrivateKey,
        peer: &PublicKey,
        prologue: &[u8],
    ) -> Result<Handshake, SecureError> {
        let builder = builder(pattern, own, prologue)?.remote_public_key(&peer.0).map_err(impossible)?;
        Ok(Handshake { state: builder.build_initiator().map_err(impossible)?, caller: true })
    }

    /// The called side: call [`Handshake::read`], look at [`Handshake::peer`], then [`Handshake::write`].
    /// `peer` is who must be calling, or `None` with [`Pattern::CallerUnknown`].
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: the pattern wants a `peer` and there is none.
    pub fn answer(
        pattern: Pattern,
        own: &PrivateKey,
        peer: Option<&PublicKey>,
        prologue: &[u8],
    ) -> Result<Handshake, SecureError> {
        let mut builder = builder(pattern, own, prologue)?;
        if let Some(peer) = peer {
            builder = builder.remote_public_key(&peer.0).map_err(impossible)?;
        }
        Ok(Handshake { state: builder.build_responder().map_err(impossible)?, caller: false })
    }

    /// The message that this side sends next.
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: it is not this side's turn.
    pub fn write(&mut self) -> Result<Vec<u8>, SecureError> {
        let mut message = vec![0; Pattern::CallerUnknown.first()];
        let len = self.state.write_message(&[], &mut message).map_err(impossible)?;
        message.truncate(len);
        Ok(message)
    }

    /// Takes the other side's message.
    ///
    /// # Errors
    /// [`SecureError::Handshake`]: it does not prove what it should.
    pub fn read(&mut self, message: &[u8]) -> Result<(), SecureError> {
        // A payload would need room, and there is none: only messages without one pass.
        self.state.read_message(message, &mut []).map(drop).map_err(|_| SecureError::Handshake)
    }

    /// Who the other side is, once that is known.
    pub fn peer(&self) -> Option<PublicKey> {
        self.state.get_remote_static()?.try_into().ok().map(PublicKey)
    }

    /// The session, after both messages.
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: the handshake is not finished.
    pub fn finish(mut self) -> Result<SecureChannel, SecureError> {
        if !self.state.is_handshake_finished() {
            return Err(SecureError::Impossible("the handshake is not finished"));
        }
        let (from_caller, to_caller) = self.state.dangerously_get_raw_split();
        let (seal, open) = if self.caller { (from_caller, to_caller) } else { (to_caller, from_caller) };
        Ok(SecureChannel { sealer: Sealer::new(seal)?, opener: Opener::new(open)? })
    }
}

fn builder<'a>(
    pattern: Pattern,
    own: &'a PrivateKey,
    prologue: &'a [u8],
) -> Result<Builder<'a>, SecureError> {
    let parameters = pattern.name().parse().map_err(impossible)?;
    let builder = Builder::new(parameters).local_private_key(own.bytes()).map_err(impossible)?;
    builder.prologue(prologue).map_err(impossible)
}

fn impossible(_: snow::Error) -> SecureError {
    SecureError::Impossible("the handshake cannot be made")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> (PrivateKey, PrivateKey) {
        (PrivateKey::from_bytes([1; 32]), PrivateKey::from_bytes([2; 32]))
    }

    fn shake(
        mut caller: Handshake,
        mut called: Handshake,
    ) -> Result<(SecureChannel, SecureChannel), SecureError> {
        called.read(&caller.write()?)?;
        caller.read(&called.write()?)?;
        Ok((caller.finish()?, called.finish()?))
    }

    #[test]
    fn both_patterns_make_sessions_in_both_directions() {
        let (a, b) = keys();
        for pattern in [Pattern::BothKnown, Pattern::CallerUnknown] {
            let known = (pattern == Pattern::BothKnown).then(|| a.public());
            let mut caller = Handshake::call(pattern, &a, &b.public(), b"p").unwrap();
            let mut called = Handshake::answer(pattern, &b, known.as_ref(), b"p").unwrap();
            let first = caller.write().unwrap();
            assert_eq!(first.len(), pattern.first());
            called.read(&first).unwrap();
            assert_eq!(called.peer(), Some(a.public()));
            let second = called.write().unwrap();
            assert_eq!(second.len(), Pattern::SECOND);
            caller.read(&second).unwrap();
            let (near, far) = (caller.finish().unwrap(), called.finish().unwrap());
            for (sealer, opener) in [(near.sealer, far.opener), (far.sealer, near.opener)] {
                let (mut sealer, mut opener) = (sealer, opener);
                let mut text = *b"hello\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
                let tag = sealer.seal(b"head", &mut text[..5]).unwrap();
                text[5..].copy_from_slice(&tag);
                assert_ne!(&text[..5], b"hello");
                assert_eq!(opener.open(b"head", &mut text).unwrap(), b"hello");
            }
        }
    }

    #[test]
    fn another_key_another_callee_and_another_prologue_are_refused() {
        let (a, b) = keys();
        let stranger = PrivateKey::from_bytes([3; 32]);
        let call =
            |own: &PrivateKey, to: PublicKey| Handshake::call(Pattern::BothKnown, own, &to, b"p").unwrap();
        let answer =
            |prologue| Handshake::answer(Pattern::BothKnown, &b, Some(&a.public()), prologue).unwrap();
        assert!(shake(call(&a, b.public()), answer(b"p")).is_ok());
        let refused = Some(SecureError::Handshake);
        assert_eq!(shake(call(&stranger, b.public()), answer(b"p")).err(), refused);
        assert_eq!(shake(call(&a, stranger.public()), answer(b"p")).err(), refused);
        assert_eq!(shake(call(&a, b.public()), answer(b"q")).err(), refused);
    }

    #[test]
    fn who_answers_without_the_key_is_found_out() {
        let (a, b) = keys();
        let stranger = PrivateKey::from_bytes([3; 32]);
        let mut caller = Handshake::call(Pattern::CallerUnknown, &a, &b.public(), b"").unwrap();
        let mut called = Handshake::answer(Pattern::CallerUnknown, &stranger, None, b"").unwrap();
        assert_eq!(called.read(&caller.write().unwrap()), Err(SecureError::Handshake));
    }

    #[test]
    fn no_changed_shortened_or_lengthened_message_passes() {
        let (a, b) = keys();
        let mut caller = Handshake::call(Pattern::BothKnown, &a, &b.public(), b"").unwrap();
        let first = caller.write().unwrap();
        let read = |bytes: &[u8]| {
            Handshake::answer(Pattern::BothKnown, &b, Some(&a.public()), b"").unwrap().read(bytes)
        };
        assert_eq!(read(&first), Ok(()));
        for at in 0..first.len() {
            let mut changed = first.clone();
            changed[at] ^= 4;
            assert!(read(&changed).is_err(), "byte {at}");
            assert!(read(&first[..at]).is_err(), "{at} bytes");
        }
        assert!(read(&[first, vec![0]].concat()).is_err());
    }

    #[test]
    fn an_unfinished_handshake_gives_no_session() {
        let (a, b) = keys();
        let caller = Handshake::call(Pattern::BothKnown, &a, &b.public(), b"").unwrap();
        assert!(matches!(caller.finish(), Err(SecureError::Impossible(_))));
    }
}
