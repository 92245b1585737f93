//! Certificates and keys.

use std::{fs, path::Path};

use cofferdam_rpc::{Certificate, Identity, Tls};
use tonic::transport::{Server, ServerTlsConfig};

use super::Checks;
use crate::daemon::{config::TlsConfig, problem::chain};

impl Checks<'_> {
    /// `None` is a problem, `Some(None)` a daemon without TLS.
    pub(super) fn tls(&mut self) -> Option<Option<Tls>> {
        let Some(TlsConfig { certificate, key, client_ca }) = &self.config.tls else { return Some(None) };
        let certificate_pem = self.read("tls.certificate", certificate);
        let key_pem = self.read("tls.key", key);
        let client_ca_pem = client_ca.as_ref().map(|path| self.read("tls.client_ca", path));
        let identity = Identity::from_pem(certificate_pem?, key_pem?);
        let tls = ServerTlsConfig::new().identity(identity.clone());
        if let Err(error) = Server::builder().tls_config(tls.clone()) {
            let rule = format!("can't be used for TLS with the key {key:?}: {}", chain(&error));
            self.wrong("tls.certificate", rule);
            return None;
        }
        let Some(client_ca_pem) = client_ca_pem else { return Some(Some(Tls { identity, client_ca: None })) };
        let client_ca = Certificate::from_pem(client_ca_pem?);
        if let Err(error) = Server::builder().tls_config(tls.client_ca_root(client_ca.clone())) {
            self.wrong("tls.client_ca", format!("holds no certificates of CAs: {}", chain(&error)));
            return None;
        }
        Some(Some(Tls { identity, client_ca: Some(client_ca) }))
    }

    fn read(&mut self, key: &str, path: &Path) -> Option<Vec<u8>> {
        match fs::read(path) {
            Ok(contents) => Some(contents),
            Err(error) => {
                self.wrong(key, format!("can't read {}: {error}", path.display()));
                None
            }
        }
    }
}
