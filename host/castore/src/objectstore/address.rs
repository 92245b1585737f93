//! `objectstore+…` addresses.

use std::{env, io};

use object_store::{
    ClientConfigKey, ObjectStoreScheme, aws::AmazonS3ConfigKey, azure::AzureConfigKey, gcp::GoogleConfigKey,
    parse_url_opts,
};
use url::Url;

use super::Objects;
use crate::AddrError;

/// The prefix of the URL of an object store.
pub(crate) const PREFIX: &str = "objectstore+";

/// The schemes of the URL.
const SCHEMES: &[&str] = &["file", "memory", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"];
const KNOWN: &str = "\"objectstore+\" and file, memory, s3, s3a, gs, az, adl, azure, abfs, abfss, http or https";

/// Opens the object store of an address. Its query may contain options. Secrets may come from environment variables instead,
/// with the names that each vendor's own tools use.
///
/// # Errors
///
/// Names the part of the address that is wrong, but never quotes the value of an option.
pub(crate) fn open(addr: &str) -> Result<Objects, AddrError> {
    let Parts { shown, url, kind, environment, options: mut given } = parse(addr)?;
    let variables =
        env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    let mut options: Vec<(String, String)> =
        variables.filter(|(key, _)| !environment.is_empty() && key.starts_with(environment)).collect();
    // Later ones win.
    options.append(&mut given);
    // Fails when there is a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let failed = |error| AddrError::Open { addr: shown.to_owned(), source: io::Error::other(error) };
    let (store, base) = parse_url_opts(&url, options).map_err(failed)?;
    let local = (kind == ObjectStoreScheme::Local).then(|| format!("/{base}").into());
    Ok(Objects { store: store.into(), base, local })
}

/// The parts of a well-formed address.
pub(crate) struct Parts<'a> {
    /// The address without options.
    shown: &'a str,
    url: Url,
    kind: ObjectStoreScheme,
    /// Prefix of the environment variables with more options. Empty if there are none.
    environment: &'static str,
    options: Vec<(String, String)>,
}

/// Splits an address into its parts.
pub(crate) fn parse(addr: &str) -> Result<Parts<'_>, AddrError> {
    let (shown, query) = addr.split_once('?').unwrap_or((addr, ""));
    let wrong =
        |part, value: &str, rule| AddrError::Part { addr: shown.to_owned(), part, value: value.to_owned(), rule };
    let location = shown.strip_prefix(PREFIX).unwrap_or(shown);
    let scheme = location.split_once("://").map_or(location, |(scheme, _)| scheme);
    if !SCHEMES.contains(&scheme) {
        let scheme = format!("{PREFIX}{scheme}");
        return Err(AddrError::Scheme { addr: shown.to_owned(), scheme, known: KNOWN });
    }
    let url =
        Url::parse(location).map_err(|_| wrong("URL", location, "is not valid: its host or its port is wrong"))?;
    if let Some(fragment) = url.fragment() {
        return Err(wrong("fragment", fragment, "has no meaning: write %23 for a \"#\" in the path"));
    }
    let kind = match (ObjectStoreScheme::parse(&url), url.host_str()) {
        (Ok((kind, _)), _) => kind,
        (Err(_), Some(host)) if matches!(scheme, "file" | "memory") => {
            return Err(wrong("host", host, "must not be there: write the path after \"://\", with its slash"));
        }
        (Err(_), None) if !matches!(scheme, "file" | "memory") => {
            return Err(wrong("host", "", "is missing: name the bucket or the server there"));
        }
        (Err(_), _) => return Err(wrong("path", url.path(), "has an empty or a special part")),
    };
    let (environment, known): (&'static str, fn(&str) -> bool) = match kind {
        ObjectStoreScheme::AmazonS3 => ("AWS_", |key| key.parse::<AmazonS3ConfigKey>().is_ok()),
        ObjectStoreScheme::GoogleCloudStorage => ("GOOGLE_", |key| key.parse::<GoogleConfigKey>().is_ok()),
        ObjectStoreScheme::MicrosoftAzure => ("AZURE_", |key| key.parse::<AzureConfigKey>().is_ok()),
        ObjectStoreScheme::Http => ("", |key| key.parse::<ClientConfigKey>().is_ok()),
        _ => ("", |_| false),
    };
    let mut options = Vec::new();
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        if !known(&key.to_ascii_lowercase()) {
            return Err(wrong("option", &key, "is unknown to stores of this scheme"));
        }
        options.push((key.into_owned(), value.into_owned()));
    }
    Ok(Parts { shown, url, kind, environment, options })
}
