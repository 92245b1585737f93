//! A certificate authority for daemons and clients.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

/// An authority that nobody else knows.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// Makes one, with a new key.
    #[expect(clippy::new_without_default, reason = "each one is another authority")]
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("keys can be made");
        Self(CertifiedIssuer::self_signed(params, key).expect("certificates can be made"))
    }

    /// Its own certificate, in PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for 127.0.0.1 and for a client such as `dns:one.example` or `uri:one`, and its key, in PEM.
    pub fn sign(&self, client: Option<&str>) -> [String; 2] {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        params.subject_alt_names.extend(client.map(|client| {
            let ascii = |name: &str| name.try_into().expect("it is ASCII");
            match client.split_once(':') {
                Some(("dns", name)) => SanType::DnsName(ascii(name)),
                Some(("uri", name)) => SanType::URI(ascii(name)),
                _ => panic!("{client} is neither dns:NAME nor uri:NAME"),
            }
        }));
        let key = KeyPair::generate().expect("keys can be made");
        [params.signed_by(&key, &self.0).expect("certificates can be made").pem(), key.serialize_pem()]
    }
}
