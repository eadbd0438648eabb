//! Records: the sealed messages of a finished session, each direction for itself.
//!
//! A record is AES-256-GCM over its text, with the record's number as the nonce (Noise, sections 5.1 and
//! 12.4) and its head as associated data. After [`REKEY`] records both sides replace the key as section 4.2
//! (`REKEY`) says, so that a session may last: 2^20 records of 64 KiB are 2^32 blocks under one key, far
//! below what AES-GCM bears.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::{KEY, SecureError};

/// Bytes that sealing adds to a text.
pub const TAG: usize = 16;

/// Records under one key.
const REKEY: u64 = 1 << 20;

/// One direction's key and how many records it has seen.
struct Stream {
    secret: Zeroizing<[u8; KEY]>,
    key: LessSafeKey,
    next: u64,
}

impl Stream {
    fn new(secret: [u8; KEY]) -> Result<Stream, SecureError> {
        Ok(Stream { key: key(&secret)?, secret: Zeroizing::new(secret), next: 0 })
    }

    fn nonce(&self) -> Nonce {
        nonce(self.next)
    }

    /// The record is done.
    fn advance(&mut self) -> Result<(), SecureError> {
        self.next += 1;
        if self.next.is_multiple_of(REKEY) {
            let mut fresh = Zeroizing::new([0; KEY]);
            // The last nonce is reserved for this, and no record ever has it.
            let made = self.key.seal_in_place_separate_tag(nonce(u64::MAX), Aad::empty(), fresh.as_mut());
            made.map(drop).map_err(|_| SecureError::Impossible("the cipher refuses to make a key"))?;
            self.key = key(&fresh)?;
            self.secret = fresh;
        }
        Ok(())
    }
}

fn key(secret: &[u8; KEY]) -> Result<LessSafeKey, SecureError> {
    let key = UnboundKey::new(&AES_256_GCM, secret);
    key.map(LessSafeKey::new).map_err(|_| SecureError::Impossible("the cipher refuses its key"))
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// The sending direction of a session.
pub struct Sealer(Stream);

impl Sealer {
    pub(crate) fn new(secret: [u8; KEY]) -> Result<Sealer, SecureError> {
        Stream::new(secret).map(Sealer)
    }

    /// Seals `text` in place as the next record, bound to `head`; returns what must follow it on the wire.
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: the text is longer than the cipher takes (64 GiB).
    pub fn seal(&mut self, head: &[u8], text: &mut [u8]) -> Result<[u8; TAG], SecureError> {
        let tag = self.0.key.seal_in_place_separate_tag(self.0.nonce(), Aad::from(head), text);
        let tag = tag.map_err(|_| SecureError::Impossible("a record is too long"))?;
        self.0.advance()?;
        let mut out = [0; TAG];
        out.copy_from_slice(tag.as_ref());
        Ok(out)
    }
}

/// Both directions of a session between two peers.
pub struct SecureChannel {
    /// Seals what this side sends.
    pub sealer: Sealer,
    /// Opens what the other side has sent.
    pub opener: Opener,
}

/// The receiving direction of a session.
pub struct Opener(Stream);

impl Opener {
    pub(crate) fn new(secret: [u8; KEY]) -> Result<Opener, SecureError> {
        Stream::new(secret).map(Opener)
    }

    /// Opens the next record, text and tag, in place; returns the text.
    ///
    /// # Errors
    /// [`SecureError::Record`]: it is not the record that the peer sealed next with this head. The session is over;
    /// `sealed` then holds nothing of use.
    pub fn open<'a>(&mut self, head: &[u8], sealed: &'a mut [u8]) -> Result<&'a mut [u8], SecureError> {
        let nonce = self.0.nonce();
        let text =
            self.0.key.open_in_place(nonce, Aad::from(head), sealed).map_err(|_| SecureError::Record)?;
        self.0.advance()?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Sealer, Opener) {
        (Sealer::new([9; KEY]).unwrap(), Opener::new([9; KEY]).unwrap())
    }

    fn sealed(sealer: &mut Sealer, head: &[u8], text: &[u8]) -> Vec<u8> {
        let mut record = text.to_vec();
        let tag = sealer.seal(head, &mut record).unwrap();
        record.extend(tag);
        record
    }

    #[test]
    fn records_open_once_and_in_order_only() {
        let (mut sealer, mut opener) = pair();
        let first = sealed(&mut sealer, b"h", b"first");
        let second = sealed(&mut sealer, b"h", b"second");
        assert_ne!(first, sealed(&mut sealer, b"h", b"first"), "equal texts look different");
        assert_eq!(opener.open(b"h", &mut second.clone()), Err(SecureError::Record));
        assert_eq!(opener.open(b"h", &mut first.clone()).unwrap(), b"first");
        assert_eq!(opener.open(b"h", &mut first.clone()), Err(SecureError::Record), "a repeated record");
        assert_eq!(opener.open(b"h", &mut second.clone()).unwrap(), b"second");
    }

    #[test]
    fn no_changed_bit_passes_in_text_tag_or_head() {
        let (mut sealer, _) = pair();
        let record = sealed(&mut sealer, b"h", b"text");
        for bit in 0..record.len() * 8 {
            let mut changed = record.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(pair().1.open(b"h", &mut changed), Err(SecureError::Record), "bit {bit}");
        }
        assert_eq!(pair().1.open(b"i", &mut record.clone()), Err(SecureError::Record));
        for len in 0..record.len() {
            assert_eq!(
                pair().1.open(b"h", &mut record[..len].to_vec()),
                Err(SecureError::Record),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn the_key_changes_on_both_sides_at_the_same_record() {
        let (mut sealer, mut opener) = pair();
        let before = sealer.0.secret.clone();
        (sealer.0.next, opener.0.next) = (REKEY - 2, REKEY - 2);
        for i in 0..5u8 {
            let mut record = sealed(&mut sealer, &[], &[i]);
            assert_eq!(opener.open(&[], &mut record).unwrap(), [i]);
        }
        assert_ne!(*before, *sealer.0.secret);
    }
}
