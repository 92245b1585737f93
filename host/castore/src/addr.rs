use std::io;

/// Why an address can't be opened as a store.
#[derive(Debug, thiserror::Error)]
pub enum AddrError {
    /// The address has no `://`.
    #[error("{addr:?} has no scheme: write one of {known}")]
    NoScheme {
        /// The address.
        addr: String,
        /// The schemes that are understood.
        known: &'static str,
    },
    /// The scheme is unknown.
    #[error("the scheme {scheme:?} of {addr:?} is not one of {known}")]
    Scheme {
        /// The address.
        addr: String,
        /// Its scheme.
        scheme: String,
        /// The schemes that are understood.
        known: &'static str,
    },
    /// Something follows `memory://`.
    #[error("{rest:?} in {addr:?}: nothing may follow \"memory://\"")]
    NotEmpty {
        /// The address.
        addr: String,
        /// What follows the scheme.
        rest: String,
    },
    /// The path is relative, or a host comes before it.
    #[error("the path {path:?} of {addr:?} does not start with a slash: write \"{scheme}:///absolute/path\"")]
    Relative {
        /// The address.
        addr: String,
        /// Its scheme.
        scheme: &'static str,
        /// What follows the scheme.
        path: String,
    },
    /// A part of the address is wrong.
    #[error("the {part} {value:?} of {addr:?} {rule}")]
    Part {
        /// The address.
        addr: String,
        /// Its name, as in "port".
        part: &'static str,
        /// Its text.
        value: String,
        /// The rule that it breaks, as in "does not start with a slash".
        rule: &'static str,
    },
    /// The store can't be opened.
    #[error("the store at {addr:?} can't be opened")]
    Open {
        /// The address.
        addr: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}
