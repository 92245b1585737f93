//! Why a daemon can't be reached, by the errors of the connection to it.

use std::{error::Error, io};

use cofferdam_castore::grpc::{CERTIFICATE_VARIABLE, KEY_VARIABLE, PeerError};
use nix::errno::Errno;
use rustls::{AlertDescription, CertificateError, InvalidMessage};

use crate::build::failure::{Failure, causes};

/// What keeps a client from a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The socket is there and not for this user.
    NoPermission,
    /// There is no socket, or nobody accepts connections.
    NobodyListens,
    /// The host's name has no address.
    UnknownHost,
    /// No answer comes from the host.
    Unreachable,
    /// The daemon wants TLS, and the address is one without.
    ExpectsTls,
    /// The address is one with TLS, and the daemon speaks none.
    SpeaksNoTls,
    /// No trusted authority has signed the daemon's certificate.
    UnknownAuthority,
    /// The daemon's certificate is not valid for this address and time.
    InvalidCertificate,
    /// The daemon wants a certificate of this client.
    CertificateRequired,
    /// The daemon doesn't take this client's certificate.
    CertificateRefused,
    /// The daemon has closed the connection before TLS was agreed on.
    TurnedAway,
    /// The daemon has closed the connection.
    Closed,
}

/// The failure of a request to the daemon at an address, if the connection is the reason.
pub(super) fn failure(addr: &str, error: &(dyn Error + 'static)) -> Option<Failure> {
    let told = Cause::of(addr, error)?;
    let cause = told.assumed(addr, has_certificate());
    let (mut message, advice) = cause.explain(addr);
    if cause != told {
        message.push_str(", it seems: it closed the connection after the TLS handshake");
    }
    let mut failure = Failure::executor("daemon", message).advised(advice);
    failure.fields.insert("cause".to_owned(), cause.word().into());
    Some(failure)
}

/// The same of a store, if its errors have passed a connection.
pub(super) fn failure_of_store(error: &(dyn Error + 'static)) -> Option<Failure> {
    let peer_error = links(error).find_map(|link| link.downcast_ref::<PeerError>())?;
    failure(peer_error.addr(), peer_error.status())
}

fn has_certificate() -> bool {
    [CERTIFICATE_VARIABLE, KEY_VARIABLE].iter().all(|name| std::env::var_os(name).is_some_and(|path| !path.is_empty()))
}

impl Cause {
    /// The first that one of the links tells. A status of the daemon's own has none.
    fn of(addr: &str, error: &(dyn Error + 'static)) -> Option<Self> {
        let uses_tls = addr.starts_with("grpc+https:");
        links(error).skip(1).find_map(|link| Self::of_link(uses_tls, link))
    }

    /// The likely cause. What a daemon says about a client's certificate is often lost, since it closes the connection then.
    fn assumed(self, addr: &str, has_certificate: bool) -> Self {
        match self {
            Self::Closed if addr.starts_with("grpc+https:") && has_certificate => Self::CertificateRefused,
            Self::Closed if addr.starts_with("grpc+https:") => Self::CertificateRequired,
            told => told,
        }
    }

    fn of_link(uses_tls: bool, link: &(dyn Error + 'static)) -> Option<Self> {
        if let Some(error) = link.downcast_ref::<rustls::Error>() {
            return Self::of_tls(error);
        }
        if let Some(error) = link.downcast_ref::<h2::Error>() {
            // The first bytes of a TLS alert, or of HTTP/1, read as the length of a frame are too many.
            let is_no_http2 = error.reason() == Some(h2::Reason::FRAME_SIZE_ERROR);
            return if is_no_http2 && !uses_tls { Some(Self::ExpectsTls) } else { error.get_io().map(Self::of_io)? };
        }
        if let Some(error) = link.downcast_ref::<io::Error>() {
            return Self::of_io(error);
        }
        if let Some(error) = link.downcast_ref::<hyper::Error>() {
            let is_over = error.is_closed() || error.is_canceled() || error.is_incomplete_message();
            return (is_over && error.source().is_none_or(|source| !source.is::<h2::Error>())).then_some(Self::Closed);
        }
        // hyper-util's error is not public.
        link.to_string().starts_with("dns error").then_some(Self::UnknownHost)
    }

    fn of_io(error: &io::Error) -> Option<Self> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => return Some(Self::NoPermission),
            Some(Errno::ENOENT | Errno::ECONNREFUSED) => return Some(Self::NobodyListens),
            Some(Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::ETIMEDOUT) => return Some(Self::Unreachable),
            _ => {}
        }
        // h2 passes on the text of what TLS said, and nothing else.
        let text = error.to_string();
        match error.kind() {
            _ if text.ends_with("received fatal alert: CertificateRequired") => Some(Self::CertificateRequired),
            _ if text.contains("received fatal alert: ") => Some(Self::CertificateRefused),
            io::ErrorKind::UnexpectedEof if text == "tls handshake eof" => Some(Self::TurnedAway),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
                Some(Self::Closed)
            }
            io::ErrorKind::TimedOut => Some(Self::Unreachable),
            _ => None,
        }
    }

    fn of_tls(error: &rustls::Error) -> Option<Self> {
        match error {
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Some(Self::SpeaksNoTls),
            // The other is what an authority of the same name has not signed.
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                Some(Self::UnknownAuthority)
            }
            rustls::Error::InvalidCertificate(_) => Some(Self::InvalidCertificate),
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => Some(Self::CertificateRequired),
            rustls::Error::AlertReceived(
                AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateRevoked
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::DecryptError
                | AlertDescription::AccessDenied,
            ) => Some(Self::CertificateRefused),
            _ => None,
        }
    }

    /// A word for machines, stable across versions.
    fn word(self) -> &'static str {
        match self {
            Self::NoPermission => "no_permission",
            Self::NobodyListens => "nobody_listens",
            Self::UnknownHost => "unknown_host",
            Self::Unreachable => "unreachable",
            Self::ExpectsTls => "expects_tls",
            Self::SpeaksNoTls => "speaks_no_tls",
            Self::UnknownAuthority => "unknown_authority",
            Self::InvalidCertificate => "invalid_certificate",
            Self::CertificateRequired => "certificate_required",
            Self::CertificateRefused => "certificate_refused",
            Self::TurnedAway => "turned_away",
            Self::Closed => "closed",
        }
    }

    /// What is wrong, and what to do about it.
    fn explain(self, addr: &str) -> (String, String) {
        let with_scheme =
            |scheme: &str| format!("{scheme}://{}", addr.split_once("://").map_or(addr, |(_, rest)| rest));
        match self {
            Self::NoPermission => (
                format!("this user has no permission to connect to the daemon at {addr}"),
                "ask the daemon's operator for access: the socket's owner, group and mode decide who has it".to_owned(),
            ),
            Self::NobodyListens => (
                format!("nobody listens at {addr}"),
                "start it with `cofferdam daemon`, or name where it is with --daemon or COFFERDAM_DAEMON".to_owned(),
            ),
            Self::UnknownHost => (
                format!("the name of the daemon's host has no address: {addr}"),
                "check --daemon or COFFERDAM_DAEMON".to_owned(),
            ),
            Self::Unreachable => (
                format!("the host of the daemon at {addr} does not answer"),
                "check the address, and that no firewall is between".to_owned(),
            ),
            Self::ExpectsTls => {
                (format!("the daemon at {addr} expects TLS"), format!("name it as {}", with_scheme("grpc+https")))
            }
            Self::SpeaksNoTls => {
                (format!("the daemon at {addr} does not speak TLS"), format!("name it as {}", with_scheme("grpc+http")))
            }
            Self::UnknownAuthority => (
                format!("the certificate of the daemon at {addr} is not signed by an authority that is trusted here"),
                "name the file (PEM) of its authority with SSL_CERT_FILE".to_owned(),
            ),
            Self::InvalidCertificate => (
                format!("the certificate of the daemon at {addr} is not valid for this address and time"),
                "use the host's name that is in the certificate, or have the daemon's operator renew it".to_owned(),
            ),
            Self::CertificateRequired => (
                format!("the daemon at {addr} requires a client certificate"),
                format!("name the files (PEM) of yours with {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}"),
            ),
            Self::CertificateRefused => (
                format!("the daemon at {addr} refused this client's certificate"),
                format!(
                    "name another one with {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}, signed by an authority of the daemon's \
                     client_ca"
                ),
            ),
            Self::TurnedAway => (
                format!("the daemon at {addr} closed the connection at once"),
                "try again later: it has as many connections as it takes, or is about to end".to_owned(),
            ),
            Self::Closed => (
                format!("the daemon at {addr} closed the connection before it answered"),
                match addr.starts_with("grpc+http:") {
                    true => format!("name it as {} if it expects TLS, else try again", with_scheme("grpc+https")),
                    false => "try again".to_owned(),
                },
            ),
        }
    }
}

/// An error and its causes; those that an [`io::Error`] wraps, too, which its `source` skips.
fn links<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::once(error).chain(causes(error)).flat_map(|link| {
        let wrapped = link.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        std::iter::once(link).chain(wrapped.map(|wrapped| -> &(dyn Error + 'static) { wrapped }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error with a cause, as tonic's and hyper's.
    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Around {
        text: &'static str,
        source: Box<dyn Error + Send + Sync>,
    }

    fn around(source: impl Into<Box<dyn Error + Send + Sync>>) -> Around {
        Around { text: "transport error", source: source.into() }
    }

    #[test]
    fn every_error_of_a_connection_has_its_cause() {
        let os = |errno: Errno| io::Error::from(errno);
        let tls = |error: rustls::Error| io::Error::new(io::ErrorKind::InvalidData, error);
        let certificate = |error| tls(rustls::Error::InvalidCertificate(error));
        let alert = |alert| tls(rustls::Error::AlertReceived(alert));
        let reset = || io::Error::from(io::ErrorKind::ConnectionReset);
        let eof = || io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof");
        let text = |alert: &str| io::Error::new(io::ErrorKind::InvalidData, format!("received fatal alert: {alert}"));
        let no_http2 = || around(h2::Error::from(h2::Reason::FRAME_SIZE_ERROR));
        let not_found = Around { text: "dns error", source: "Name or service not known".into() };
        for (addr, has_certificate, error, cause) in [
            ("grpc+unix:///s", false, around(os(Errno::EACCES)), Some(Cause::NoPermission)),
            ("grpc+unix:///s", false, around(os(Errno::ENOENT)), Some(Cause::NobodyListens)),
            ("grpc+unix:///s", false, around(os(Errno::ECONNREFUSED)), Some(Cause::NobodyListens)),
            ("grpc+http://h:1", false, around(around(os(Errno::ECONNREFUSED))), Some(Cause::NobodyListens)),
            ("grpc+http://h:1", false, around(os(Errno::EHOSTUNREACH)), Some(Cause::Unreachable)),
            ("grpc+http://h:1", false, around(io::Error::from(io::ErrorKind::TimedOut)), Some(Cause::Unreachable)),
            ("grpc+http://h:1", false, around(not_found), Some(Cause::UnknownHost)),
            ("grpc+http://h:1", false, no_http2(), Some(Cause::ExpectsTls)),
            ("grpc+https://h:1", false, no_http2(), None),
            ("grpc+http://h:1", false, around(reset()), Some(Cause::Closed)),
            ("grpc+https://h:1", false, around(reset()), Some(Cause::CertificateRequired)),
            ("grpc+https://h:1", true, around(reset()), Some(Cause::CertificateRefused)),
            ("grpc+https://h:1", true, around(eof()), Some(Cause::TurnedAway)),
            ("grpc+https://h:1", true, around(text("CertificateRequired")), Some(Cause::CertificateRequired)),
            ("grpc+https://h:1", false, around(text("CertificateUnknown")), Some(Cause::CertificateRefused)),
            (
                "grpc+https://h:1",
                false,
                around(tls(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType))),
                Some(Cause::SpeaksNoTls),
            ),
            (
                "grpc+https://h:1",
                true,
                around(certificate(CertificateError::UnknownIssuer)),
                Some(Cause::UnknownAuthority),
            ),
            (
                "grpc+https://h:1",
                false,
                around(certificate(CertificateError::Expired)),
                Some(Cause::InvalidCertificate),
            ),
            (
                "grpc+https://h:1",
                false,
                around(alert(AlertDescription::CertificateRequired)),
                Some(Cause::CertificateRequired),
            ),
            ("grpc+https://h:1", true, around(alert(AlertDescription::UnknownCA)), Some(Cause::CertificateRefused)),
            ("grpc+unix:///s", false, around("something else"), None),
        ] {
            let told = Cause::of(addr, &around(error)).map(|cause| cause.assumed(addr, has_certificate));
            assert_eq!(told, cause, "{addr} {cause:?}");
        }
    }

    #[test]
    fn a_status_of_the_daemons_own_is_no_matter_of_the_connection() {
        assert_eq!(failure("grpc+unix:///s", &tonic::Status::unavailable("draining")), None);
    }

    #[test]
    fn advice_names_the_address_with_the_other_scheme() {
        assert_eq!(Cause::ExpectsTls.explain("grpc+http://h:1").1, "name it as grpc+https://h:1");
        assert_eq!(Cause::SpeaksNoTls.explain("grpc+https://h:1").1, "name it as grpc+http://h:1");
    }
}
