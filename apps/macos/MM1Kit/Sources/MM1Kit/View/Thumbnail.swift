#if canImport(SwiftUI)
    import SwiftUI

    /// A small picture, decoded when it changes.
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
            .task(id: picture) { image = picture.drawn(atMost: Int(2 * side)) }
        }
    }
#endif
