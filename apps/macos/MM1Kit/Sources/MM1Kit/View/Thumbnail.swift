#if canImport(SwiftUI) && canImport(ImageIO)
    import ImageIO
    import SwiftUI

    /// A small picture, decoded once.
    struct Thumbnail: View {
        let picture: Picture
        /// Its longest side, in points.
        let side: CGFloat
        @State private var image: CGImage?

        var body: some View {
            Group {
                if let image {
                    Image(decorative: image, scale: 2).resizable().scaledToFit()
                } else {
                    Color.secondary.opacity(0.2)
                }
            }
            .frame(maxWidth: side, maxHeight: side)
            .task { image = picture.shrunk(to: Int(2 * side)) }
        }
    }

    extension Picture {
        /// The picture upright, with a longest side of at most so many pixels; nil of what is none.
        func shrunk(to side: Int) -> CGImage? {
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
