#if canImport(ImageIO)
    import Foundation
    import ImageIO

    extension Picture {
        /// The picture upright, shrunk to sides of at most so many pixels; nil of what is none.
        func drawn(atMost side: Int) -> CGImage? {
            guard let source = CGImageSourceCreateWithData(data as CFData, nil) else { return nil }
            let options: [CFString: Any] = [
                kCGImageSourceCreateThumbnailFromImageAlways: true,
                kCGImageSourceCreateThumbnailWithTransform: true,
                kCGImageSourceThumbnailMaxPixelSize: side,
            ]
            return CGImageSourceCreateThumbnailAtIndex(source, 0, options as CFDictionary)
        }
    }
#endif
