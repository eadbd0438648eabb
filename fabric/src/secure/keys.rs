//! X25519 keys.

use std::fmt;

use curve25519_dalek::MontgomeryPoint;
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::SecureError;

/// Bytes of a key of either kind.
pub const KEY: usize = 32;

/// A private key. Wiped from memory when dropped; never shown.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; KEY]>);

impl PrivateKey {
    /// A fresh one from the system's random number generator.
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: the generator fails.
    pub fn generate() -> Result<PrivateKey, SecureError> {
        let mut bytes = Zeroizing::new([0; KEY]);
        fill_random(bytes.as_mut())?;
        Ok(PrivateKey(bytes))
    }

    /// The key of these bytes; any will do (RFC 7748, section 5).
    pub fn from_bytes(bytes: [u8; KEY]) -> PrivateKey {
        PrivateKey(Zeroizing::new(bytes))
    }

    /// The bytes, for a key file or a handshake.
    pub fn bytes(&self) -> &[u8; KEY] {
        &self.0
    }

    /// The key that follows from this one, used as a secret, for the purpose that the concatenation of
    /// `purpose` names: HKDF-SHA256 (RFC 5869).
    ///
    /// # Errors
    /// [`SecureError::Impossible`]: never, as so few bytes are asked for.
    pub fn derive(&self, purpose: &[&[u8]]) -> Result<PrivateKey, SecureError> {
        let refused = |_| SecureError::Impossible("no key can be derived");
        let mut bytes = Zeroizing::new([0; KEY]);
        let source = Salt::new(HKDF_SHA256, b"gestalt key derivation 1").extract(self.bytes());
        source.expand(purpose, HKDF_SHA256).and_then(|key| key.fill(bytes.as_mut())).map_err(refused)?;
        Ok(PrivateKey(bytes))
    }

    /// The public key that belongs to it.
    pub fn public(&self) -> PublicKey {
        PublicKey(MontgomeryPoint::mul_base_clamped(*self.0).to_bytes())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// A public key: what others know somebody by. No secret.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub struct PublicKey(pub [u8; KEY]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Fills `bytes` from the system's random number generator.
///
/// # Errors
/// [`SecureError::Impossible`]: the generator fails.
pub fn fill_random(bytes: &mut [u8]) -> Result<(), SecureError> {
    let failed = |_| SecureError::Impossible("the system's random number generator fails");
    SystemRandom::new().fill(bytes).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_key_is_that_of_rfc_7748() {
        // Section 6.1, Alice.
        let private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a";
        assert_eq!(PrivateKey::from_bytes(private).public().to_string(), public);
    }

    #[test]
    fn derived_keys_depend_on_secret_and_purpose() {
        let (a, b) = (PrivateKey::from_bytes([1; KEY]), PrivateKey::from_bytes([2; KEY]));
        let public = |key: &PrivateKey, purpose: &[u8]| key.derive(&[purpose]).unwrap().public();
        assert_eq!(public(&a, b"xy"), a.derive(&[b"x", b"y"]).unwrap().public());
        assert_ne!(public(&a, b"x"), public(&a, b"y"));
        assert_ne!(public(&a, b"x"), public(&b, b"x"));
        assert_ne!(public(&a, b"x"), a.public());
    }

    #[test]
    fn a_private_key_is_not_shown_and_no_two_are_alike() {
        let (a, b) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        assert_ne!(a.bytes(), b.bytes());
        assert_eq!(format!("{a:?}"), "PrivateKey(..)");
    }
}
