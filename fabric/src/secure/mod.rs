//! Secure channels: a peer proves its identity, and what is sent is read by the two sides only.
//!
//! Sessions between nodes, and between a node and its coordinator, begin with a Noise handshake (the Noise
//! Protocol Framework, revision 34, by the `snow` crate) over X25519, AES-256-GCM and SHA-256. It proves to
//! each side, freshly, that the other has the private key of the public key that it is known by, and gives
//! each direction a key of its own, which nobody can compute later even with both private keys.
//!
//! ```text
//! caller                                       called
//! Handshake::call ──── first message ────────> Handshake::answer   caller's key checked; may be a replay
//! read <────────────── second message ──────── write               called one is proven and fresh
//! finish                                       finish
//! Sealer ───────────── first record ─────────> Opener              caller is proven fresh: not before
//! ```
//!
//! - [`PrivateKey`], [`PublicKey`]: an identity.
//! - [`Handshake`]: the two messages.
//! - [`SecureChannel`]: what a finished handshake gives. [`Sealer`] and [`Opener`] are one direction each;
//!   records have implicit numbers, so one that is lost, repeated, moved or changed is noticed.
//!
//! The cryptography itself is that of the crates `snow`, `ring` and `curve25519-dalek`.

mod handshake;
mod keys;
mod record;

pub use handshake::{Handshake, Pattern};
pub use keys::{KEY, PrivateKey, PublicKey, fill_random};
pub use record::{Opener, Sealer, SecureChannel, TAG};

/// An error of a secure channel.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SecureError {
    /// A handshake message does not prove what it should: another key, another prologue, or changed on its
    /// way.
    #[error("it does not have the key that it should have, or what it sent was changed on its way")]
    Handshake,
    /// A record was not sealed by the peer, for this place in the stream.
    #[error("it sent a record that was not sealed by it for this place: changed, repeated or out of order")]
    Record,
    /// The system's random number generator, or a limit of the cipher.
    #[error("no secure session is possible: {0}")]
    Impossible(&'static str),
}
