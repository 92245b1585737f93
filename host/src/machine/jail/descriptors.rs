use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Lets this process have so many descriptors open, or as many as it may. What needs more fails then, and says so.
pub(crate) fn allow_descriptors(wanted: u64) {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < wanted => {
            if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard) {
                tracing::warn!("can't raise the limit on open files from {soft} to {wanted}: {error}");
            }
        }
        _ => {}
    }
}
