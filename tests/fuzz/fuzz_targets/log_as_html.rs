//! Fuzzes the decoder of logs that are shown by a browser.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::log_as_html(bytes);
});
