//! The certificates that builds with a network find beside those of their root.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use bytes::Bytes;
use cofferdam_protocol::MAX_CA_FILE_BYTES;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// A file of CA certificates in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct CaFile(Bytes);

/// Why a file is no file of CA certificates.
#[derive(Debug, thiserror::Error)]
pub enum CaFileError {
    /// It can't be read.
    #[error("can't be read")]
    Read(#[from] io::Error),
    /// It is too large.
    #[error("holds more than {MAX_CA_FILE_BYTES} bytes")]
    TooLarge,
    /// It is no PEM, or has no certificate.
    #[error("holds no certificate in PEM")]
    NoCertificate,
    /// One of its certificates is no certificate.
    #[error("certificate {number} can't be used")]
    Certificate {
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
}

impl CaFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// See [`CaFileError`].
    pub fn read(path: &Path) -> Result<Self, CaFileError> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_CA_FILE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Self::new(bytes.into())
    }

    fn new(bytes: Bytes) -> Result<Self, CaFileError> {
        if bytes.len() > MAX_CA_FILE_BYTES {
            return Err(CaFileError::TooLarge);
        }
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&bytes) {
            count += 1;
            let certificate = certificate.map_err(|_| CaFileError::NoCertificate)?;
            let added = RootCertStore::empty().add(certificate);
            added.map_err(|source| CaFileError::Certificate { number: count, source })?;
        }
        if count == 0 {
            return Err(CaFileError::NoCertificate);
        }
        Ok(Self(bytes))
    }

    /// The file's contents.
    pub(crate) fn contents(&self) -> &Bytes {
        &self.0
    }
}

/// Files that differ are printed differently.
impl fmt::Debug for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CaFile").field(&blake3::hash(&self.0).to_hex()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate() -> String {
        rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap().cert.pem()
    }

    #[test]
    fn a_file_of_certificates_is_taken_as_it_is() {
        let text = format!("# a comment\n{}{}", certificate(), certificate());
        assert_eq!(CaFile::new(text.clone().into()).unwrap().contents(), text.as_bytes());
    }

    #[test]
    fn what_is_no_file_of_certificates_is_refused_with_a_reason() {
        let cut = certificate().replacen("MII", "AAA", 1);
        for (text, why) in [
            (String::new(), "no certificate"),
            ("-----BEGIN NOTHING".to_owned(), "no certificate"),
            (format!("{}{cut}", certificate()), "certificate 2 can't be used"),
            (" ".repeat(MAX_CA_FILE_BYTES + 1), "more than 1048576 bytes"),
        ] {
            let error = CaFile::new(text.into()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(matches!(CaFile::read(Path::new("/nowhere/ca.pem")), Err(CaFileError::Read(_))));
    }
}
