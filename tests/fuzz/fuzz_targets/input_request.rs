//! Fuzzes the decoder of what the device for inputs asks of the host.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::input_request(bytes);
});
