//! How a VMM proves that it is the one that was started.
//!
//! A VMM is given 32 random bytes at start, through a file descriptor and never through its
//! arguments or environment, and hands them to its successor. Whoever finds a control socket
//! sends a nonce; HMAC-SHA256 of it under the secret proves the VMM. The caller is checked the
//! other way round by the directory's mode and `SO_PEERCRED`.

use std::fmt::Write;

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Bytes of a secret.
pub const LEN: usize = 32;

/// A VM's secret. Its `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; LEN]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// A new one from the kernel's random source.
    pub fn random() -> rustix::io::Result<Self> {
        let mut bytes = [0; LEN];
        let mut filled = 0;
        while filled < LEN {
            filled += rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            )?;
        }
        Ok(Self(bytes))
    }

    /// From bytes that were kept.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes, to be kept in a place only the owner can read.
    pub fn as_bytes(&self) -> &[u8; LEN] {
        &self.0
    }

    fn mac(&self, nonce: &str) -> Hmac<Sha256> {
        let mut mac =
            <Hmac<Sha256> as Mac>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(b"stillpoint-vmm");
        mac.update(nonce.as_bytes());
        mac
    }

    /// The proof for `nonce`, in hexadecimal.
    pub fn prove(&self, nonce: &str) -> String {
        hex(&self.mac(nonce).finalize().into_bytes())
    }

    /// Whether `proof` is the one for `nonce`; takes the same time for every wrong one.
    pub fn check(&self, nonce: &str, proof: &str) -> bool {
        let Some(bytes) = unhex(proof) else {
            return false;
        };
        self.mac(nonce).verify_slice(&bytes).is_ok()
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Bytes of a hexadecimal text; `None` if it is not one.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_secret_proves() {
        let (a, b) = (
            Secret::random().expect("random"),
            Secret::random().expect("random"),
        );
        let proof = a.prove("nonce");
        assert!(a.check("nonce", &proof));
        assert!(!a.check("other nonce", &proof));
        assert!(!b.check("nonce", &proof));
        assert!(!a.check("nonce", ""));
        assert!(!a.check("nonce", "zz"));
    }
}
